"""``torchrun -m megatron.pretrain``: ``pretrain_gpt.py`` from an installed package."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Imports take seconds; who interrupts them wants no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from megatron.pretrain.program import end, main

if __name__ == "__main__":
    end(main())
