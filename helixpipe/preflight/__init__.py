"""Looks at every node of a job before it trains: ``helixpipe preflight``.

``facts`` is what a rank tells about itself, ``links`` measures between ranks, ``checks`` judges both and says
which host is to blame, ``flight`` leads the ranks through it over a ``board``, ``table`` prints.
"""
