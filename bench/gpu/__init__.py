"""Parts of ``bench/gpu.sh`` outside of the suite: the GPU tests in several processes, and constants of the machine."""
