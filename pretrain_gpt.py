"""Pre-train a GPT: ``torchrun pretrain_gpt.py --pipeline-schedule helix …``."""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Imports take seconds; who interrupts them wants no traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from megatron.pretrain.program import end, forward_step, main

__all__ = ["forward_step", "main"]

if __name__ == "__main__":
    end(main())
