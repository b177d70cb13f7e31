"""The parts of ``bench/gpu.sh`` that are not the suite: the GPU tests in several processes, constants of the machine."""
