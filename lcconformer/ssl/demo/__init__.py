"""The demo: two small encoders pretrained on real speech in minutes, compared in one report."""

from .plan import DemoPlan, default_plan, plan_for_time
from .run import run_demo
from .speech import load_demo_speech

__all__ = ["DemoPlan", "default_plan", "load_demo_speech", "plan_for_time", "run_demo"]
