"""HelixPipe: pipeline schedules for long-context training."""
