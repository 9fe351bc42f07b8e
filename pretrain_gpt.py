"""Pre-train a GPT: ``torchrun pretrain_gpt.py --pipeline-schedule helix …``."""

import gc
import signal

if __name__ == "__main__":
    # Imports make many objects and no garbage; looking for it takes a fifth of their time.
    gc.disable()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Imports take seconds; who interrupts them wants no traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

from megatron.pretrain.program import end, forward_step, main

__all__ = ["forward_step", "main"]

if __name__ == "__main__":
    # What was imported stays: training need not look through it again and again.
    gc.freeze()
    gc.enable()
    end(main())
