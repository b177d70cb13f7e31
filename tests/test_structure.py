"""The house has one direction: no module imports from a room above its own, none from below in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "lcconformer": ROOT / "lcconformer",
    "lcconformer.kernels": ROOT / "kernels",
    "lcconformer.bench": ROOT / "bench",
}

# rooms from the bottom up; a name stands for the module or package and what is below it, the longest one counts
ROOMS = (
    (
        "lcconformer.config", "lcconformer.sharing", "lcconformer.runtime", "lcconformer.tolerance",
        "lcconformer.architectures", "lcconformer.plain", "lcconformer.validation", "lcconformer.tensor_files",
        "lcconformer.quantization",
    ),
    ("lcconformer.kernels", "lcconformer.extension"),
    ("lcconformer.ops",),
    ("lcconformer.positions", "lcconformer.packing"),
    ("lcconformer.blocks",),
    ("lcconformer.layer", "lcconformer.conditioning", "lcconformer.subsampling", "lcconformer.depth"),
    ("lcconformer.stack", "lcconformer.model_card", "lcconformer.pretrained"),
    ("lcconformer.loop",),
    ("lcconformer.streaming", "lcconformer.encoder"),
    ("lcconformer.conformer", "lcconformer.conversion", "lcconformer.interop", "lcconformer.auto"),
    ("lcconformer",),
    ("lcconformer.data",),
    ("lcconformer.ssl",),
    ("lcconformer.info", "lcconformer.doctor", "lcconformer.tune"),
    ("lcconformer.bench",),
    ("lcconformer.cli", "lcconformer.__main__"),
)  # fmt: skip


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            if package == "lcconformer.bench" and path.name.startswith(("bench_", "conftest")):
                continue  # pytest collects these; nobody imports them
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def room(module: str) -> int:
    """Number of the room, by the longest name that fits; the root package is a room of its own."""
    fitting = [
        (len(name), number)
        for number, names in enumerate(ROOMS)
        for name in names
        if module == name or (name != "lcconformer" and module.startswith(name + "."))
    ]
    assert fitting, f"{module} is in no room: add it to ROOMS"
    return max(fitting)[1]


def imports(module: str) -> Iterator[tuple[str, str]]:
    """(module of this project, name taken from it or "") for every import, nested and TYPE_CHECKING ones too."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                base = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*base, *([source] if source else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in MODULES:
                    yield inner, ""
                elif source in MODULES:
                    yield source, alias.name


@pytest.mark.parametrize("module", MODULES)
def test_no_import_goes_up(module):
    up = [target for target, _ in imports(module) if room(target) > room(module)]
    assert not up, f"{module} imports {', '.join(up)} from a room above its own"


def test_no_circle():
    graph = {module: {target for target, _ in imports(module)} - {module} for module in MODULES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"imports in a circle: {' -> '.join((*path, module))}"
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def package_of(module: str) -> str:
    return module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_private_names_stay_in_their_package(module):
    taken = [
        f"{target}.{name}" if name else target
        for target, name in imports(module)
        if any(part.startswith("_") and not part.startswith("__") for part in (name, target.rpartition(".")[2]))
        and package_of(module) != package_of(target)
    ]
    assert not taken, f"{module} imports {', '.join(taken)}, which are private to another package"


def test_the_rule_would_notice():
    assert room("lcconformer.ops.feed_forward.cpu") < room("lcconformer.layer") < room("lcconformer.loop.training")
    assert ("lcconformer.ops.gemm", "matmul_transposed") in set(imports("lcconformer.ops.feed_forward.cpu"))
    assert ("lcconformer.kernels.relpos_attention", "") in set(imports("lcconformer.ops.relpos_attention.triton"))
