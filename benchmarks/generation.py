"""Seconds and memory of generation: Transformers' `generate` on unsorted batches of 8 against what is used here.

    python benchmarks/generation.py --size base --examples 16 --repeats 3

For concat and fid, that is `EncoderDecoder.generate` with a BART, which gets the same examples in order of length, in
batches of at most `--max_tokens` source tokens. For prompt, it is `prompted_search` with a decoder-only model of
SmolLM2-135M's size, in batches of 8 in order of length. Weights are random, large enough for outputs to vary; nothing
is downloaded. All numbers include the encoder, or reading the prompts. The two ways are timed in turns within one
process, so that both meet the same load; the ratio is that of each turn. Memory is what a process of its own needs
beyond the loaded model for 32 new tokens: the highest resident size that Linux reports (VmHWM; on a GPU, the most that
was allocated).

Results

2026-11-24; AMD EPYC (Zen 4), 2 cores, torch 2.13.0+cpu, transformers 5.24.0; BART base, 4 beams; median (range) of 3
turns; 128 new tokens of 16 examples for concat (`--fusion concat --examples 16`), 32 new tokens of 8 examples for fid
(`--fusion fid --examples 8 --max_new_tokens 32`). Single slow turns are other work on the machine.

| source | computed in | generate, s | ours, s | ratio | same outputs | generate, MiB | ours, MiB |
| --- | --- | --- | --- | --- | --- | ---: | ---: |
| concat | float32 | 72.84 (72.73 to 96.48) | 21.35 (21.30 to 25.65) | 3.42 (3.41 to 3.76) | 16 of 16 | 857 | 537 |
| concat | bfloat16 | 37.58 (33.39 to 37.89) | 14.97 (14.52 to 28.46) | 2.53 (1.17 to 2.59) | 5 of 16 | 978 | 608 |
| fid | float32 | 48.35 (47.26 to 73.65) | 12.83 (12.50 to 18.81) | 3.78 (3.77 to 3.92) | 8 of 8 | 2896 | 775 |
| fid | bfloat16 | 32.85 (31.59 to 40.44) | 7.25 (7.12 to 7.98) | 4.53 (4.44 to 5.07) | 5 of 8 | 1823 | 851 |

2026-11-26; AMD EPYC (Zen 5), the same otherwise; 128 new tokens for concat and 64 for fid, of 8 examples, one turn
(`--fusion fid --examples 8 --repeats 1`, and likewise concat):

| source | computed in | generate, s | ours, s | ratio | same outputs | generate, MiB | ours, MiB |
| --- | --- | --- | --- | --- | --- | ---: | ---: |
| concat | float32 | 27.71 | 6.79 | 4.08 | 8 of 8 | 605 | 257 |
| concat | bfloat16 | 10.90 | 3.78 | 2.88 | 2 of 8 | 823 | 426 |
| fid | float32 | 61.49 | 8.66 | 7.10 | 8 of 8 | 2870 | 843 |
| fid | bfloat16 | 42.45 | 4.65 | 9.13 | 5 of 8 | 1849 | 817 |

2026-11-26; an Intel Xeon, likewise (`--compute_dtype float32`), before sources were encoded in smaller parts:

| source | computed in | generate, s | ours, s | ratio | same outputs | generate, MiB | ours, MiB |
| --- | --- | --- | --- | --- | --- | ---: | ---: |
| concat | float32 | 47.53 | 12.87 | 3.69 | 8 of 8 | 605 | 258 |
| fid | float32 | 100.89 | 18.91 | 5.34 | 8 of 8 | 2915 | 734 |

2026-11-28; an Intel Xeon without bfloat16 instructions, a decoder-only model of SmolLM2-135M's size, 64 new tokens, one
turn (`--fusion prompt --examples 16 --repeats 1 --compute_dtype float32`):

| source | computed in | generate, s | ours, s | ratio | same outputs | generate, MiB | ours, MiB |
| --- | --- | --- | --- | --- | --- | ---: | ---: |
| prompt | float32 | 233.50 | 33.78 | 6.91 | 16 of 16 | 3730 | 999 |

In bfloat16 the two ways round at different places and so part.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from hardware import hardware
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from utils.fast import cpu
from utils.fast.beam_search import prompted_search
from utils.models.encoder_decoder import EncoderDecoder
from utils.models.sources import collate
from utils.training.batching import eval_batches

EOS, PAD = 2, 1
NEW_TOKENS = {"concat": 128, "fid": 64, "prompt": 64}
DECODER_VOCABULARY = 49152


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", choices=["small", "base"], default="base", help="BART with d_model 256, or BART-base")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="turns of both ways, after the one that warms up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compute_dtype", choices=["float32", "bfloat16", "both"], default="both",
                        help="bfloat16: under autocast")  # fmt: skip
    parser.add_argument("--fusion", choices=["concat", "fid", "prompt", "all"], default="all")
    parser.add_argument("--max_tokens", type=int, default=16384, help="source tokens of one of our batches")
    parser.add_argument("--max_new_tokens", type=int, help="[128 for concat, else 64]")
    parser.add_argument("--eos_bias", type=float, default=0.0, help="logit added to the end token: outputs end early")
    parser.add_argument("--no_onednn", action="store_true", help="matrix products as PyTorch does them")
    return parser.parse_args()


def build(args):
    torch.manual_seed(0)
    width = {"small": 256, "base": 768}[args.size]
    config = BartConfig(
        d_model=width, encoder_layers=6, decoder_layers=6, encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        init_std=width**-0.5 * 1.2, forced_eos_token_id=EOS,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()
    model.final_logits_bias[0, EOS] = args.eos_bias
    return EncoderDecoder(model).to(args.device)


def build_decoder_only(args):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=DECODER_VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True, initializer_range=576**-0.5,
        pad_token_id=PAD, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    cpu.use_fast_layers(model)
    if args.eos_bias:
        bias = torch.zeros(config.vocab_size, device=args.device).index_fill(0, torch.tensor(EOS), args.eos_bias)
        model.lm_head.register_forward_hook(lambda module, inputs, logits: logits + bias)
    return model.to(args.device)


def make_sources(fusion: str, examples: int) -> list[list[list[int]]]:
    """Token ids of each sequence of each example.

    concat: one sequence each, log-normal around 280 tokens, up to 512; fid: 8 to 10 of 130 to 256 tokens; prompt: one
    of 500 to 1,400 tokens.
    """
    generator = torch.Generator().manual_seed(1)
    vocabulary = DECODER_VOCABULARY if fusion == "prompt" else 50265

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def sequence(tokens):
        return [0, *torch.randint(3, vocabulary, (tokens - 2,), generator=generator).tolist(), EOS]

    if fusion == "prompt":
        return [[sequence(draw(500, 1400))] for _ in range(examples)]
    if fusion == "fid":
        return [[sequence(draw(130, 256)) for _ in range(draw(8, 10))] for _ in range(examples)]
    lengths = (280 * torch.exp(0.45 * torch.randn(examples, generator=generator))).clamp(32, 512).long().tolist()
    return [[sequence(length)] for length in lengths]


def batch_of(sources, device):
    batch = collate(sources, [[EOS]] * len(sources), PAD).to(device)
    del batch["labels"]
    return batch


def theirs(summarizer, sources, args, generation) -> list[list[int]]:
    rows = []
    for start in range(0, len(sources), 8):
        with torch.no_grad():
            hidden, mask = summarizer.encode(**batch_of(sources[start : start + 8], args.device))
            ids = summarizer.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask, **generation
            )
        rows += ids[:, 1:].tolist()
    return without_padding(rows)


def ours(summarizer, sources, args, generation) -> list[list[int]]:
    tokens = [sum(map(len, source)) for source in sources]
    batches = [[]]
    for i in sorted(range(len(sources)), key=lambda i: -tokens[i]):
        if batches[-1] and (len(batches[-1]) + 1) * tokens[batches[-1][0]] > args.max_tokens:
            batches.append([])
        batches[-1].append(i)
    rows = [None] * len(sources)
    for batch in batches:
        ids = summarizer.generate(**batch_of([sources[i] for i in batch], args.device), **generation)
        for i, row in zip(batch, ids.tolist(), strict=True):
            rows[i] = row
    return without_padding(rows)


def theirs_prompted(model, sources, args, generation) -> list[list[int]]:
    rows = []
    for start in range(0, len(sources), 8):
        ids, mask = prompts_of(sources[start : start + 8], args.device, left=True)
        ids = model.generate(input_ids=ids, attention_mask=mask, **generation)[:, ids.shape[1] :]
        rows += ids.tolist()
    return without_padding(rows)


def ours_prompted(model, sources, args, generation) -> list[list[int]]:
    rows = [None] * len(sources)
    with cpu.laid_out_weights(model):
        for batch in eval_batches([len(source[0]) for source in sources], batch_size=8):
            ids, mask = prompts_of([sources[i] for i in batch], args.device)
            ids = prompted_search(model, ids, mask, **generation)
            for i, row in zip(batch, ids.tolist(), strict=True):
                rows[i] = row
    return without_padding(rows)


def prompts_of(sources, device, left: bool = False):
    """Token ids and mask, padded on the right or on the left. The last token, an end, is left out."""
    rows = [torch.tensor(source[0][:-1]) for source in sources]
    side = "left" if left else "right"
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side=side)
    ones = [torch.ones_like(row) for row in rows]
    mask = torch.nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def without_padding(rows):
    return [[token for token in row if token != PAD] for row in rows]


def setting(args, fusion: str, dtype: str):
    """The summarizer or decoder-only model, the sources, the settings of generation, and the context to generate in."""
    if args.no_onednn:
        cpu.IS_AVAILABLE = False
    generation = {"num_beams": 4, "max_new_tokens": args.max_new_tokens or NEW_TOKENS[fusion], "do_sample": False}
    autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=dtype == "bfloat16")
    model = build_decoder_only(args) if fusion == "prompt" else build(args)
    return model, make_sources(fusion, args.examples), generation, autocast


def measure_memory(args, fusion, dtype, way, queue):
    """Puts the mebibytes that one run needs beyond the model."""
    summarizer, sources, generation, autocast = setting(args, fusion, dtype)
    before = resident(args.device, "VmRSS")
    with autocast:
        way(summarizer, sources, args, {**generation, "max_new_tokens": min(generation["max_new_tokens"], 32)})
    queue.put(resident(args.device, "VmHWM") - before)


def resident(device: str, name: str) -> float:
    """Mebibytes now (VmRSS) or at most so far (VmHWM)."""
    if device.startswith("cuda"):
        return (torch.cuda.memory_allocated() if name == "VmRSS" else torch.cuda.max_memory_allocated()) / 2**20
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) / 1024


def memory(args, fusion, dtype, way) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure_memory, args=(args, fusion, dtype, way, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def compare(args, fusion: str, dtype: str) -> str:
    summarizer, sources, generation, autocast = setting(args, fusion, dtype)
    slow, fast = (theirs_prompted, ours_prompted) if fusion == "prompt" else (theirs, ours)
    seconds = {slow: [], fast: []}
    with autocast:
        for way in seconds:  # a warm-up
            way(summarizer, sources[:2], args, {**generation, "max_new_tokens": 4})
        for turn in range(args.repeats):
            outputs = {}
            for way in (slow, fast) if turn % 2 == 0 else (fast, slow):
                synchronize(args.device)
                began = time.perf_counter()
                outputs[way] = way(summarizer, sources, args, generation)
                synchronize(args.device)
                seconds[way].append(time.perf_counter() - began)
    ratios = [first / second for first, second in zip(seconds[slow], seconds[fast], strict=True)]
    same = sum(a == b for a, b in zip(outputs[slow], outputs[fast], strict=True))
    peaks = [memory(args, fusion, dtype, way) for way in (slow, fast)]
    return (
        f"| {fusion} | {dtype} | {spread(seconds[slow])} | {spread(seconds[fast])} | {spread(ratios)} "
        f"| {same} of {len(sources)} | {peaks[0]:.0f} | {peaks[1]:.0f} |"
    )


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main():
    args = parse()
    print(f"{hardware()}; {args.examples} examples, 4 beams; BART {args.size}, or 135M Llama for prompt", flush=True)
    print("| source | computed in | generate, s | ours, s | ratio | same outputs | generate, MiB | ours, MiB |")
    print("| --- | --- | --- | --- | --- | --- | ---: | ---: |", flush=True)
    for fusion in ("concat", "fid", "prompt") if args.fusion == "all" else (args.fusion,):
        for dtype in ("float32", "bfloat16") if args.compute_dtype == "both" else (args.compute_dtype,):
            print(compare(args, fusion, dtype), flush=True)


if __name__ == "__main__":
    main()
