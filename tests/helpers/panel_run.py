"""A run in a terminal: ``python panel_run.py FOLDER EVENT``, where the event happens in its second rollout."""

import logging
import os
import signal
import sys
import warnings

from tiny_run import DATASET, make

from sppo import HFRollout


class Engine(HFRollout):
    """Prints, warns, logs and forks, and reports progress."""

    on_progress = None
    calls = 0

    def generate(self, prompts, **settings):
        self.calls += 1
        if self.calls == 4:  # after two evaluations and a rollout
            print("printed [/b] in the run")
            warnings.warn("warned in the run", stacklevel=1)
            logging.getLogger("transformers").warning("logged in the run")
            if pid := os.fork():
                os.waitpid(pid, 0)
            else:
                print("printed in a child", type(sys.stdout).__name__, flush=True)
                os._exit(0)
            if sys.argv[2] == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
        samples = super().generate(prompts, **settings)
        self.on_progress(len(samples), len(samples))
        return samples


if __name__ == "__main__":
    folder, event = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets background jobs ignore it
    print("before the run")
    trainer = make(
        folder,
        eval_dataset=DATASET.select(range(4)),
        disable_tqdm=False,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        log_completions=True,
        rollout_engine="panel_run:Engine",
    )
    print(type(trainer.console).__name__)
    trainer.evaluate()
    trainer.train()
    print("after the run")
