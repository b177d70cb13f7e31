"""The demo: two small encoders pretrained on real speech in minutes, compared in one report."""
