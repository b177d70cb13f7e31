"""What is made of result rows: tables, plots, filed results, the README's section, goals and evidence."""

from pathlib import Path

__all__ = ["RESULTS"]

# bench/results, where results are committed
RESULTS = Path(__file__).resolve().parents[1] / "results"
