"""A small language model that shows the library at work: ``logitless-demo compare``, ``train`` and ``converge``."""
