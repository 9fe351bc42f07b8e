"""Pictures of timelines, predicted and measured alike.

``text`` for the terminal, ``picture`` for PNG and SVG, ``page`` for HTML, ``perfetto`` for trace viewers;
``advice`` and ``comparison_text`` are tables. Import the module that is needed:
matplotlib takes a second to load.
"""
