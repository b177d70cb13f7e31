# package REPO SITE: the Python parts of a checkout as they are installed, in SITE/lcconformer; what was compiled there stays.
# Sourced by gpu.sh and paper.sh.
package() {
  local repo=$1 target=$2/lcconformer part
  mkdir -p "$target/kernels" "$target/bench" || return
  (cd "$target" && find . -name '*.py' -delete) || return
  for part in lcconformer:. kernels:kernels bench:bench; do
    tar -C "$repo/${part%:*}" --exclude='*.so' --exclude=__pycache__ -cf - . | tar -C "$target/${part#*:}" -xf - || return
  done
}
