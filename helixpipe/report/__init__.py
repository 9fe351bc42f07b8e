"""Pictures of timelines, predicted and measured alike."""

from helixpipe.report.picture import draw_timeline
from helixpipe.report.text import text_grid

__all__ = ["draw_timeline", "text_grid"]
