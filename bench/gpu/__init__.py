"""What ``bench/gpu.sh`` runs: the driver with its plan, and the phases, each a command of its own."""
