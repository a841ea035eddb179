"""Where the time of a training step goes on a processor, and which share of the machine's limits it reaches.

    python benchmarks/step_profile.py                              # all models, default precision, all cores
    python benchmarks/step_profile.py --models retriever --precision no --threads 1

The training scripts run as they are, under torch.profiler, on one batch again and again: after a warm-up `--steps`
steps are timed without the profiler, and as many with it.

* summarizer: train_summarize.py, a BART of base size, 16 examples (texts of summarizer_training.py)
* retriever: train_retrieve.py, MiniLM, 64 pairs (texts of retriever_training.py), with its dropout of 0.1
* language_model: train_summarize.py, a Llama of SmolLM2-135M's size with random weights, sources of 500 to 1,400
  tokens, two micro-batches of at most 4,096 tokens

Each operator's own time (without that of operators that it calls) is counted in one row of CATEGORIES, so that the rows
add up to the step. What an operator does in a backward pass is counted where its forward pass was. "Python" is what
passes between operators. Products are compared with the fastest square product that the same process measures
afterwards, in the precision that most of them use. The rows that memory limits are compared with a copy, by the bytes
that they read and write at least: what is in a cache is faster, hence shares above 100%. PyTorch's own kernel for
attention, which long sequences use, is no matrix product here: its operations are not counted.

2026-11-29, Intel Xeon (AVX-512, no bf16 instructions), torch 2.13.0+cpu, float32, one core of two, otherwise idle (with
`--threads 1`, 3:48 minutes). Limits: 176 to 178 GFLOP/s, copy 13.3 to 13.7 GB/s. Share of the step:

                                       summarizer  retriever  language_model
    seconds a step                          12.58       5.85           40.39
    products, forward                       19.1%      21.0%           20.5%
    products, backward                      38.3%      44.4%           36.6%
    products of the output layer            21.0%                       1.8%
    attention within sequences               7.1%      17.1%           22.3%
    loss                                     3.4%       0.0%            1.7%
    activations (GELU, SiLU)                 1.0%       3.8%            4.5%
    norm layers                              0.7%       1.4%            4.1%
    dropout                                  1.7%       3.3%
    biases                                   1.3%       2.8%
    layout of heads, rotary positions        1.3%       2.6%            4.1%
    optimizer                                1.4%       0.5%            0.4%
    norm of the gradients, clipping          0.7%       0.2%            0.2%
    sums of gradients, embeddings            1.7%       1.3%            2.3%
    data, casts                              0.0%       0.2%            0.0%
    residuals, Python, rest                  1.1%       1.3%            1.6%
    peak reached in products                  95%        90%             87%
    peak reached by the whole step            75%        65%            >52%

So the step is bound by matrix products, which are near the peak. What would save a step less than 3% was left out. In
CPU time on one core; the first two by alternating steps of smaller models, on an otherwise idle machine:

* RMS norms a few rows at a time, in a function of their own (23 to 11 ms for 4,096 tokens): 1.7 to 2.2% of a step.
* Attention's gradients by `squeeze(0)`, where `[0]` copies them into zeros: 0.8 to 1.1%.
* Attention without padding and without gathering rows, for MiniLM's texts: 190 against 206 ms a layer; PyTorch's kernel
  for them: 192 ms; for the sources of BART: 180 against 198 ms. At most 1.5% of a step.
* The causal backward pass by blocks of matrix products: 66 to 88 ms, with the forward pass, against 55 ms of PyTorch's
  kernel (1,000 tokens, 9 heads on 3).
* Softmax and loss a few rows at a time: 109 to 137 against 113 ms (640 targets, a vocabulary of 50,265).
* SiLU and its product a few rows at a time: 30 to 35 against 28 ms (4,096 tokens, 1,536 wide).
* Products with their bias by oneDNN: 41 against 39 ms (4,480 x 384 x 1,536), 79 against 72 ms (2,240 x 768 x 3,072).
* Gradients of biases by a product with a vector: 1.5 against 4.2 ms (4,480 x 1,536), estimated at 0.8% of a step.
"""

import argparse
import json
import math
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
WARM_UP = 1  # steps that are not counted

PRODUCT = r"aten::(mm|addmm|bmm|baddbmm)$|mkldnn::_linear_pointwise$"
# row: a pattern of "forward or backward > modules > operators", the outermost first; the first row that matches counts
CATEGORIES = {
    "data, collating": r"DataLoader",
    "optimizer": r"Optimizer\.",
    "norm of the gradients, clipping": r"^aten::(_foreach_(norm|mul)|linalg_vector_norm|stack|reciprocal|clamp|item)",
    "attention within sequences": r"_Attention|scaled_dot_product",
    "products of the output layer": rf"_VocabularyLoss.*({PRODUCT})",
    "loss": r"_VocabularyLoss|contrastive_loss|log_softmax",
    "products, forward": rf"^forward.*({PRODUCT})",
    "products, backward": rf"^backward.*({PRODUCT})",
    "biases": r"aten::addmm > |AddmmBackward0.*aten::sum",
    "dropout": r"[Dd]ropout",
    "casts": r"aten::_to_copy",
    "norm layers": r"Norm",
    "sums of gradients": r"AccumulateGrad|^backward.*aten::add_?$",
    "rotary positions": r"Rotary|[Aa]ttention > aten::(neg|mul|add|cat|slice|unsqueeze)$",
    "layout of heads": r"[Aa]ttention > |aten::(transpose|contiguous|clone)",
    "activations (GELU, SiLU)": r"gelu|silu|G[Ee][Ll][Uu]|SiLU|Silu|MLP > aten::mul|MLP > evaluate_function: Mul",
    "embeddings": r"[Ee]mbedding|[Ii]ndex_?[Ss]elect",
    "residuals": r"(Layer|Output) > (aten::add|evaluate_function: Add)",
}
MEMORY_BOUND = ("optimizer", "norm of the gradients, clipping", "loss", "dropout", "casts", "norm layers",
                "rotary positions", "biases", "activations (GELU, SiLU)", "residuals", "sums of gradients")  # fmt: skip
# operators that move nothing, and those whose result is small
COSTLESS = re.compile(
    r"aten::(empty|view|_?reshape|_unsafe_view|transpose|t$|as_strided|expand|select$|slice$|detach|"
    r"alias|unsqueeze|squeeze|permute|narrow|split|resolve|result_type|unflatten|to$|item)"
)
REDUCED = re.compile(r"aten::(sum|mean|linalg_vector_norm|amax|logsumexp|gather|mv|dot)")


# ---- what is trained


def make(folder: Path, model: str) -> list[str]:
    """The data and the model; returns the command that trains it."""
    flags = ["--train_file", folder / "train.jsonl", "--validation_file", folder / "validation.jsonl",
             "--output_dir", folder / "run", "--resume_from_checkpoint", "none", "--learning_rate", 2e-5,
             "--overfit_one_batch", "--log_format", "none", "--log_steps", 10**6,
             "--checkpointing_steps", 10**6]  # fmt: skip
    if model == "retriever":
        from retriever_training import find_minilm, write_data

        write_data(folder, find_minilm(), pairs=256)
        return ["train_retrieve.py", "--model_name_or_path", folder / "dropout", "--num_hard_negatives", 0,
                "--draft_share", 0, "--per_device_train_batch_size", 64, *flags]  # fmt: skip
    import summarizer_training

    flags += ["--retriever", "lead", "--model_name_or_path", folder / "model", "--max_new_tokens", 1]
    if model == "summarizer":
        summarizer_training.make(folder, "base")
        return ["train_summarize.py", *flags]
    from language_model_training import SIZES, TARGETS
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from utils.files import write_jsonl

    summarizer_training.make(folder, "small")  # for its tokenizer and words
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    words = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["passages"][0].split()
    sizes, lengths = SIZES["135m"]
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**sizes, **special, tie_word_embeddings=True, max_position_embeddings=8192)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "language_model")
    tokenizer.save_pretrained(folder / "language_model")
    rng = np.random.default_rng(0)
    texts = [[" " + " ".join(rng.choice(words, rng.integers(low, high + 1))) for low, high in (lengths, TARGETS)]
             for _ in range(100)]  # fmt: skip
    rows = [{"id": str(i), "passages": [text], "summary": summary} for i, (text, summary) in enumerate(texts)]
    write_jsonl(folder / "train.jsonl", rows)
    flags[flags.index(folder / "model")] = folder / "language_model"
    return ["train_summarize.py", *flags, "--max_tokens", 4096, "--gradient_accumulation_steps", 2,
            "--max_source_length", 1536, "--max_target_length", 160]  # fmt: skip


# ---- in a process of its own: the script, under the profiler


def run(command: list[str], steps: int, result: Path) -> None:
    """Trains until `steps` steps were timed and as many profiled; writes what was found."""
    from utils.fast import cpu
    from utils.models import contrastive
    from utils.training.log import RunLog

    # so that the profile has their names
    for module, function in ((cpu, "dropout"), (contrastive, "contrastive_loss")):
        setattr(module, function, torch.profiler.record_function(function)(getattr(module, function)))
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
    ended, marks, open_modules = [0], {}, []

    def enter(module, arguments):
        open_modules.append(torch.profiler.record_function(type(module).__name__))
        open_modules[-1].__enter__()

    def leave(module, arguments, output):
        open_modules.pop().__exit__(None, None, None)

    def note_step(self, **values):
        ended[0] += 1
        marks[ended[0]] = time.perf_counter(), time.process_time()
        if ended[0] == WARM_UP + steps:
            torch.nn.modules.module.register_module_forward_pre_hook(enter)
            torch.nn.modules.module.register_module_forward_hook(leave, always_call=True)
            profile.start()
            marks["profiled"] = time.perf_counter()
        if ended[0] == WARM_UP + 2 * steps:
            wall = time.perf_counter() - marks["profiled"]
            profile.stop()
            began, end = marks[WARM_UP], marks[WARM_UP + steps]
            found = {"wall": (end[0] - began[0]) / steps, "cpu": (end[1] - began[1]) / steps, "profiled": wall / steps}
            result.write_text(json.dumps(found | count(profile.events(), wall, steps) | limits()))
            os._exit(0)

    RunLog.advance = note_step
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name="__main__")


def count(events, wall: float, steps: int) -> dict:
    """Seconds, floating point operations and bytes of a step by category, and the largest operators of the rest."""
    rows, flops, moved = Counter(), Counter(), Counter()
    operators, kinds = defaultdict(Counter), Counter()
    forward = forward_operators(events)
    for event in events:
        if event.is_user_annotation and not re.search("Optimizer|DataLoader", event.name):
            continue  # the time between its operators
        row, path = place(event, forward)
        seconds = event.self_cpu_time_total / 1e6
        rows[row] += seconds
        operators[row][path if row == "rest" else path.rpartition(" > ")[2]] += seconds / steps
        shapes = [shape for shape in event.input_shapes or () if shape and isinstance(shape[0], int)]
        if re.search(PRODUCT, event.name) and len(shapes) >= 2:
            operations = product_flops(event.name, shapes)
            flops[row] += operations
            kinds[next(iter(event.input_dtypes or ["float"]))] += operations
        elif not COSTLESS.match(event.name) and all(COSTLESS.match(child.name) for child in event.cpu_children):
            moved[row] += bytes_of(event)
    rows["Python"] = wall - rows.total()
    scale = lambda counted: {name: value / steps for name, value in counted.items()}  # noqa: E731
    return {"rows": scale(rows), "flops": scale(flops), "moved": scale(moved),
            "operators": {row: of_row.most_common(8) for row, of_row in operators.items()},
            "kind": kinds.most_common(1)[0][0]}  # fmt: skip


def forward_operators(events) -> dict:
    """The operator that a node of the backward pass belongs to, by the number that they share."""
    numbered = (event for event in events if event.sequence_nr >= 0 and not event.name.startswith("autograd::"))
    return {event.sequence_nr: event for event in numbered if not is_backward(event)}  # the last one is the innermost


def parents(event):
    while event is not None:
        yield event
        event = event.cpu_parent


def is_backward(event) -> bool:
    return any(parent.name.startswith("autograd::engine::evaluate_function") for parent in parents(event))


def place(event, forward: dict) -> tuple[str, str]:
    """The category of an operator, and its path. In a backward pass, the path has the modules of the forward pass."""
    names, side = [], ""
    for parent in parents(event):
        if parent.name in ("forward", "backward"):
            side = side or "forward"
            break
        names.insert(0, parent.name.removeprefix("autograd::engine::"))
        if parent.name.startswith("autograd::engine::evaluate_function"):
            side, origin = "backward", forward.get(parent.sequence_nr)
            modules = [each.name for each in parents(origin) if each.is_user_annotation] if origin else []
            names[:0] = [name for name in reversed(modules) if name not in ("forward", "backward")]
            break
    path = " > ".join([side] * bool(side) + names)
    return next((row for row, pattern in CATEGORIES.items() if re.search(pattern, path)), "rest"), path


def product_flops(name: str, shapes: list) -> float:
    """Multiplications and additions of a matrix product, by the shapes of its inputs."""
    a, b = shapes[1:3] if "addmm" in name or "baddbmm" in name else shapes[:2]
    columns = b[0] if "linear" in name else b[-1]
    return 2.0 * math.prod(a) * columns


def bytes_of(event) -> float:
    """What an operator reads, and writes if its result is as large as its largest input."""
    size = 2 if any("BFloat16" in str(kind) for kind in event.input_dtypes or ()) else 4
    numbers = list(all_numbers(event.structured_input_shapes))
    if "_fused_adamw_" in event.name:  # reads weights, gradients and two averages, and writes all but the gradients
        return size * sum(numbers) * 7 / 4
    if re.match(r"aten::(fill_|zero_)", event.name):
        return size * max(numbers, default=0)
    is_whole = not REDUCED.match(event.name) and "copy_" not in event.name
    return size * (sum(numbers) + is_whole * max(numbers, default=0))


def all_numbers(shapes):
    """How many numbers each tensor has, also those in lists."""
    if shapes and all(isinstance(each, int) for each in shapes):
        yield math.prod(shapes)
        return
    for each in shapes or ():
        yield from all_numbers(each) if isinstance(each, list | tuple) else ()


def limits() -> dict:
    """Fastest square matrix product in each precision, operations per second; bytes per second of a large copy."""
    found = {}
    for kind in (torch.float32, torch.bfloat16):
        if kind == torch.bfloat16 and not torch.cpu._is_avx512_bf16_supported():
            continue
        a, b = (torch.randn(2048, 2048).to(kind) for _ in range(2))
        with torch.no_grad():
            found[str(kind).removeprefix("torch.")] = 2 * 2048**3 / fastest(lambda: a @ b)  # noqa: B023
    source = torch.ones(2**27, dtype=torch.uint8)
    copy = torch.empty_like(source)
    return {"peaks": found, "bandwidth": 2 * 2**27 / fastest(lambda: copy.copy_(source))}


def fastest(work) -> float:
    """Seconds of the fastest of some calls."""
    seconds = []
    for _ in range(8):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


# ---- the table


def show(model: str, found: dict, operators: int) -> None:
    rows, flops, moved = (defaultdict(float, found[name]) for name in ("rows", "flops", "moved"))
    kind = "bfloat16" if "BFloat16" in found["kind"] and "bfloat16" in found["peaks"] else "float32"
    peak, bandwidth, step = found["peaks"][kind], found["bandwidth"], sum(rows.values())
    print(f"\n{model}: {found['wall']:.2f} s a step ({found['cpu']:.2f} s of CPU time), {found['profiled']:.2f} s with "
          "the profiler")  # fmt: skip
    for row in (*CATEGORIES, "Python", "rest"):
        seconds = rows[row]
        if not seconds:
            continue
        line = f"    {row:36} {seconds:7.3f} s {seconds / step:6.1%}"
        if flops[row] / peak > 0.1 * seconds:
            line += f" {flops[row] / seconds / 1e9:8.0f} GFLOP/s {flops[row] / seconds / peak:5.0%} of the peak"
        elif row in MEMORY_BOUND and moved[row]:
            rate = moved[row] / seconds
            line += f" {rate / 1e9:8.1f} GB/s    {rate / bandwidth:5.0%} of the bandwidth"
        print(line)
        for name, seconds in found["operators"].get(row, ())[: max(operators, 3 * (row == "rest"))]:
            print(f"        {seconds:7.3f} s {name}")
    products = sum(seconds for row, seconds in rows.items() if row.startswith("products"))
    in_products = sum(operations for row, operations in flops.items() if row.startswith("products"))
    every = sum(flops.values())
    peaks = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {name}" for name, value in found["peaks"].items())
    print(f"    limits of this machine: {peaks}, copy {bandwidth / 1e9:.1f} GB/s")
    print(f"    matrix products outside attention: {products / step:.0%} of the step, at "
          f"{in_products / products / peak:.0%} of the peak; all products, over the step's time without the profiler: "
          f"{every / found['wall'] / peak:.0%} of the peak in {kind}", flush=True)  # fmt: skip


def main():
    models = ("summarizer", "retriever", "language_model")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=models, default=models)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=1, help="timed, and again with the profiler")
    parser.add_argument("--operators", type=int, default=0, help="largest operators of each row that are printed")
    parser.add_argument("--precision", choices=("no", "bf16"), help="default: that of the scripts")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # a child: command, file of the result
    args = parser.parse_args()
    if args.run:
        run(json.loads(args.run[0]), args.steps, Path(args.run[1]))
        raise SystemExit("the run ended before its last profiled step")

    import transformers
    from hardware import hardware

    transformers.utils.logging.disable_progress_bar()
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                                "OMP_NUM_THREADS": str(args.threads)}  # fmt: skip
    print(f"{hardware()}, {args.threads} threads, precision {args.precision or 'default'}, --steps {args.steps}")
    for model in args.models:
        with tempfile.TemporaryDirectory() as folder:
            command = make(Path(folder), model)
            command += ["--mixed_precision", args.precision] if args.precision else []
            command += ["--max_train_steps", WARM_UP + 2 * args.steps + 1]
            result = Path(folder) / "result.json"
            child = [sys.executable, __file__, "--steps", str(args.steps), "--run", json.dumps([*map(str, command)]),
                     str(result)]  # fmt: skip
            done = subprocess.run(child, env=environment, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-3000:])
            show(model, json.loads(result.read_text()), args.operators)


if __name__ == "__main__":
    main()
