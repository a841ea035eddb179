"""What saving costs: the share of the wall time that goes to one checkpoint a minute of a 140M-parameter summarizer.

    python benchmarks/checkpoint_overhead.py

A BART of bart-base's size trains on random batches with AdamW, in pairs of windows of the same number of steps. One
window of each pair, in turn the first and the second, begins with a checkpoint, saved as the scripts do it: copied
while training waits, then written, synced and verified by its checksum while training goes on. What that window takes
longer, over 60 seconds, is the overhead.

    2026-11-23, AMD EPYC, 2 cores, torch 2.13.0+cpu
    139M parameters, 1.67 GB in a checkpoint, 10 steps a window
    a save by itself            1.84 s
    training waits              0.09 s
    training loses altogether   1.27 s (standard error 0.07, 5 pairs of windows)
    at one checkpoint a minute   2.1% of the wall time
    (--pairs 5 --seconds 12; on a processor the checksum takes its time from one of the two cores that train)
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import BartConfig, BartForConditionalGeneration, get_scheduler

sys.path.insert(0, str(Path(__file__).parent.parent))
from hardware import hardware

from utils.models.encoder_decoder import EncoderDecoder
from utils.models.sources import collate
from utils.training.checkpoints import Checkpoints
from utils.training.loop_state import LoopState
from utils.training.memory import keep_memory
from utils.training.step import parameter_groups


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=8, help="pairs of windows, with and without a checkpoint")
    parser.add_argument("--seconds", type=float, default=20, help="length of a window: well over the time of a save")
    parser.add_argument("--output_dir", help="where checkpoints go: the disk to be measured [a temporary folder]")
    args = parser.parse_args()

    accelerator = Accelerator()
    keep_memory()
    torch.manual_seed(0)
    config = BartConfig(d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
                        decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072)  # fmt: skip
    summarizer = EncoderDecoder(BartForConditionalGeneration(config))
    optimizer = torch.optim.AdamW(parameter_groups(summarizer, 0.01), lr=1e-5, fused=True)
    scheduler = get_scheduler("constant", optimizer)
    model, optimizer = accelerator.prepare(summarizer, optimizer)
    sources = [[torch.randint(5, 50000, (96,)).tolist()] for _ in range(4)]
    targets = [torch.randint(5, 50000, (32,)).tolist() for _ in sources]
    batch = collate(sources, targets, pad_token_id=1).to(accelerator.device)

    def train(steps: int) -> None:
        for _ in range(steps):
            with accelerator.autocast():
                loss, _ = model(**batch, label_smoothing_factor=0.1)
            accelerator.backward(loss / batch["labels"].numel())
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()

    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        checkpoints = Checkpoints(
            accelerator, SimpleNamespace(checkpoints_total_limit=3), Path(folder), lambda *event, **values: None,
            SimpleNamespace(received=None), model=model, optimizer=optimizer, scheduler=scheduler,
            fingerprint=lambda epoch: {},
        )  # fmt: skip
        train(3)
        began = time.perf_counter()
        train(3)
        steps = max(1, round(args.seconds / (time.perf_counter() - began) * 3))
        lost, copied, written = [], [], []
        for pair in range(2 * args.pairs):
            with_checkpoint = pair % 4 in (0, 3)
            began = time.perf_counter()
            if with_checkpoint:
                checkpoints.save(LoopState(step=pair), {}, is_best=False)
                copied.append(time.perf_counter() - began)
            train(steps)
            seconds = time.perf_counter() - began
            if with_checkpoint:
                assert not checkpoints.thread.is_alive(), "--seconds is too short for a save"
                checkpoints.wait()
            if pair % 2 == 0:
                first = seconds
            else:
                lost.append((seconds - first) * (1 if with_checkpoint else -1))
        for step in range(3):  # on its own, while nothing trains
            began = time.perf_counter()
            checkpoints.save(LoopState(step=1000 + step), {}, is_best=False)
            checkpoints.wait()
            written.append(time.perf_counter() - began)

    parameters = sum(parameter.numel() for parameter in summarizer.parameters())
    mean, error = statistics.mean(lost), statistics.stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else float("nan")
    print(hardware())
    print(f"{parameters / 1e6:.0f}M parameters, {parameters * 12 / 1e9:.2f} GB in a checkpoint, {steps} steps a window")
    print(f"a save by itself          {statistics.median(written):6.2f} s")
    print(f"training waits            {statistics.median(copied):6.2f} s")
    print(f"training loses altogether {mean:6.2f} s (standard error {error:.2f}, {len(lost)} pairs of windows)")
    print(f"at one checkpoint a minute{mean / 60:7.1%} of the wall time")


if __name__ == "__main__":
    main()
