"""Plans memory and step time on 1, 8 and 64 GPUs on paper, for BART-large, a 1B and an 8B language model.

    python benchmarks/plan.py [--memory 141 --peak 989 --utilization 0.4 --link 450 --network 50]

Nothing here is measured. Each number follows from the shape of the model and from the options: a GPU's memory (GB) and
its bfloat16 peak (TFLOPS) as its data sheet says, the share of the peak that one hopes for, and how much a GPU sends in
a second to the others of its machine, and to other machines (GB/s). Put in what benchmarks/gpu.py and a test of your
network say. What is counted for one GPU:

* weights: 4 bytes each, in float32; 2 bytes each, in bfloat16, if adapters are trained instead. For each weight that is
  trained: gradient 4 bytes, AdamW 8 bytes. With FSDP (more than one GPU) a GPU holds its share of these.
* casts: autocast keeps a copy in bfloat16, 2 bytes, of each float32 weight that is multiplied, until the backward pass
  has used it. With FSDP only two layers are whole at a time.
* activations: what autograd keeps for the backward pass, counted by running one layer of each kind on tensors that have
  no data; with --gradient_checkpointing the inputs of the layers, and all of one layer. Logits: those of one chunk.
* work: 6 operations for each weight and token, 4 if the weight is not trained; attention within a sequence, a causal
  one as half of a full one; with --gradient_checkpointing, a second forward pass.
* exchange: DDP sends 2 (n - 1) / n times the gradients, in float32, between n GPUs, while the backward pass of the last
  micro-batch runs. FSDP gathers the weights in bfloat16 for each pass, and sends gradients in float32 once for each
  micro-batch. What takes longer than the computing that it runs beside is waited for.

Results with the default options: 8 examples of 1,024 and 128 tokens in the one micro-batch of each GPU. `held`: the
weights, gradients and optimizer. Gradient checkpointing where it does not fit without, FSDP where DDP does not fit with
checkpointing.

| model | trained | GPUs | | checkpointing | held, GB | casts | activations | in all | step | waiting | tokens/s |
| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| BART-large | all | 1 |  | no | 6.5 | 0.8 | 5.1 | 12 | 0.03 s | 0% | 351,055 |
| BART-large | all | 8 | DDP | no | 6.5 | 0.8 | 5.1 | 12 | 0.03 s | 0% | 2,808,439 |
| BART-large | all | 64 | DDP | no | 6.5 | 0.8 | 5.1 | 12 | 0.07 s | 64% | 8,145,606 |
| BART-large | rank 16 | 1 |  | no | 0.9 | 0.0 | 8.6 | 10 | 0.02 s | 0% | 484,332 |
| BART-large | rank 16 | 8 | DDP | no | 0.9 | 0.0 | 8.6 | 10 | 0.02 s | 0% | 3,874,653 |
| BART-large | rank 16 | 64 | DDP | no | 0.9 | 0.0 | 8.6 | 10 | 0.02 s | 0% | 30,997,227 |
| 1B | all | 1 |  | no | 19.8 | 2.5 | 16.8 | 39 | 0.15 s | 0% | 63,393 |
| 1B | all | 8 | DDP | no | 19.8 | 2.5 | 16.8 | 39 | 0.15 s | 0% | 507,141 |
| 1B | all | 64 | DDP | no | 19.8 | 2.5 | 16.8 | 39 | 0.24 s | 40% | 2,426,258 |
| 1B | rank 16 | 1 |  | no | 2.6 | 0.0 | 24.1 | 27 | 0.10 s | 0% | 92,410 |
| 1B | rank 16 | 8 | DDP | no | 2.6 | 0.0 | 24.1 | 27 | 0.10 s | 0% | 739,284 |
| 1B | rank 16 | 64 | DDP | no | 2.6 | 0.0 | 24.1 | 27 | 0.10 s | 0% | 5,914,272 |
| 8B | all | 1 |  | yes | 128.5 | 15.0 | 5.1 | 149: too much |  |  |  |
| 8B | all | 8 | FSDP | no | 16.1 | 2.1 | 60.0 | 78 | 1.00 s | 0% | 73,372 |
| 8B | all | 64 | FSDP | no | 2.0 | 2.1 | 60.0 | 64 | 1.26 s | 21% | 466,350 |
| 8B | rank 16 | 1 |  | no | 16.6 | 0.0 | 87.9 | 105 | 0.68 s | 0% | 13,536 |
| 8B | rank 16 | 8 | DDP | no | 16.6 | 0.0 | 87.9 | 105 | 0.68 s | 0% | 108,289 |
| 8B | rank 16 | 64 | DDP | no | 16.6 | 0.0 | 87.9 | 105 | 0.68 s | 0% | 866,310 |
"""

import argparse
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AttentionInterface, AutoModel, BartConfig, LlamaConfig

SOURCE, TARGET = 1024, 128  # tokens of an example; a language model reads one after the other
EXAMPLES = 8  # in a micro-batch
CHUNK = 512  # target positions whose logits are made at once
RANK = 16  # of adapters
ON_ONE_MACHINE = 8  # GPUs
LLAMA = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8}
MODELS = {  # sizes of facebook/bart-large, Llama 3.2 1B and Llama 3.1 8B, as published
    "BART-large": BartConfig(),
    "1B": LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                      tie_word_embeddings=True, **LLAMA),
    "8B": LlamaConfig(hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, head_dim=128,
                      tie_word_embeddings=False, **LLAMA),
}  # fmt: skip


@dataclass
class Stack:
    """Layers of one kind, and what one of them takes for a micro-batch."""

    layers: int
    tokens: int  # of the micro-batch
    hidden: int
    weights: int  # of a layer
    trained: int
    kept: int  # bytes of activations
    attention: float  # operations of its forward pass


class FusedAttention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: queries, keys, values and its output, but no scores."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, output)
        return output


AttentionInterface.register("fused", lambda module, query, key, value, mask, **options: (
    FusedAttention.apply(query, key, value).transpose(1, 2), None))  # fmt: skip


def kept_bytes(layer, **inputs) -> int:
    """Bytes that autograd keeps for the backward pass of a layer, without its weights."""
    weights, kept = {id(p) for p in layer.parameters()}, {}

    def keep(tensor):
        base = tensor if tensor._base is None else tensor._base  # a view keeps the whole
        if id(base) not in weights:
            kept[id(base)] = base
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(**inputs)
    return sum(tensor.nbytes for tensor in kept.values())


def stacks_of(config, adapters: bool) -> tuple[list[Stack], int]:
    """The model's stacks of layers, and the weights of its output layer."""
    with torch.device("meta"):
        model = AutoModel.from_config(config, dtype=torch.bfloat16, attn_implementation="fused").train()
        if adapters:
            inject_adapter_in_model(LoraConfig(r=RANK, target_modules="all-linear"), model)

    def states(tokens: int) -> torch.Tensor:
        size = (EXAMPLES, tokens, config.hidden_size)
        return torch.empty(size, dtype=torch.bfloat16, device="meta").requires_grad_()

    if config.is_encoder_decoder:
        parts = [
            (model.encoder.layers, SOURCE, 2 * SOURCE, {"attention_mask": None}),
            (model.decoder.layers, TARGET, TARGET + 2 * SOURCE, {"encoder_hidden_states": states(SOURCE)}),
        ]
    else:
        length = SOURCE + TARGET
        places = torch.arange(length, device="meta")[None]
        turned = model.rotary_emb.to("meta")(states(length), places)
        parts = [(model.layers, length, length, {"position_embeddings": turned})]
    stacks = []
    for layers, length, seen, options in parts:  # each token sees `seen` / 2 others on average
        weights = list(layers[0].parameters())
        attention = (
            EXAMPLES
            * length
            * 2
            * seen
            * config.num_attention_heads
            * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        )
        stacks.append(Stack(
            len(layers), EXAMPLES * length, config.hidden_size, sum(p.numel() for p in weights),
            sum(p.numel() for p in weights if p.requires_grad),
            kept_bytes(layers[0], hidden_states=states(length), **options), attention,
        ))  # fmt: skip
    return stacks, config.vocab_size * config.hidden_size


def plan(config, adapters: bool, checkpointing: bool, gpus: int, args) -> tuple[dict, dict]:
    """Gigabytes and seconds of a step of one micro-batch on each GPU."""
    stacks, output = stacks_of(config, adapters)
    layers = sum(s.layers * s.weights for s in stacks)
    tables = output * (1 if config.tie_word_embeddings else 2)
    trained = sum(s.layers * s.trained for s in stacks) + (0 if adapters else tables)
    sharded = gpus > 1 and args.fsdp
    of_weights = (2 if adapters else 4) * (layers + tables)
    share = gpus if sharded else 1
    biggest = max(s.weights for s in stacks)
    memory = {
        "weights": of_weights / share,
        "gradients": 4 * trained / share,
        "optimizer": 8 * trained / share,
        "casts": 2 * 2 * max(biggest, output) if sharded else 0 if adapters else 2 * (layers + output),
        "activations": (sum(s.layers * 2 * s.hidden * s.tokens for s in stacks) + max(s.kept for s in stacks)
                        if checkpointing else sum(s.layers * s.kept for s in stacks)),
        "logits": 3 * 4 * CHUNK * config.vocab_size,
    }  # fmt: skip
    forward = sum(s.layers * (2 * s.weights * s.tokens + s.attention) for s in stacks)
    forward += 2 * output * EXAMPLES * TARGET
    speed = args.peak * 1e12 * args.utilization
    passes = 2 if checkpointing else 1
    compute = {"forward": passes * forward / speed, "backward": (1 if adapters else 2) * forward / speed}
    if adapters:  # attention's backward pass is whole
        compute["backward"] += sum(s.layers * s.attention for s in stacks) / speed
    link = (args.link if gpus <= ON_ONE_MACHINE else args.network) * 1e9
    if gpus == 1:
        sent = 0.0
    elif sharded:
        sent = (gpus - 1) / gpus * ((passes + 1) * 2 * (layers + tables) + 4 * trained)
    else:
        sent = (gpus - 1) / gpus * 2 * 4 * trained
    beside = sum(compute.values()) if sharded else compute["backward"]
    seconds = compute | {"exchange": sent / link, "waiting": max(0.0, sent / link - beside)}
    return {name: value / 1e9 for name, value in memory.items()}, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--memory", type=float, default=141, help="GB of a GPU (default: an H200's)")
    parser.add_argument("--peak", type=float, default=989, help="TFLOPS in bfloat16 (default: an H200's, dense)")
    parser.add_argument("--utilization", type=float, default=0.4, help="share of the peak that is hoped for")
    parser.add_argument("--link", type=float, default=450, help="GB/s to the GPUs of a machine (NVLink 4)")
    parser.add_argument("--network", type=float, default=50, help="GB/s of a GPU to other machines (400 Gbit/s)")
    args = parser.parse_args()
    print(
        "| model | trained | GPUs | | checkpointing | GB of a GPU: weights, gradients, optimizer | casts | "
        "activations | in all | step | of it waiting | real tokens a second |"
    )
    print("| --- | --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, config in MODELS.items():
        for adapters in (False, True):
            for gpus in (1, 8, 64):
                for args.fsdp in (False, True):
                    for checkpointing in (False, True):
                        memory, seconds = plan(config, adapters, checkpointing, gpus, args)
                        needed = sum(memory.values())
                        if needed <= args.memory:
                            break
                    if needed <= args.memory or gpus == 1:
                        break
                held = memory["weights"] + memory["gradients"] + memory["optimizer"]
                kind = "" if gpus == 1 else "FSDP" if args.fsdp else "DDP"
                row = [
                    name,
                    f"rank {RANK}" if adapters else "all",
                    gpus,
                    kind,
                    "yes" if checkpointing else "no",
                    f"{held:.1f}",
                    f"{memory['casts']:.1f}",
                    f"{memory['activations'] + memory['logits']:.1f}",
                ]
                if needed > args.memory:
                    row += [f"{needed:.0f}: too much", "", "", ""]
                else:
                    step = seconds["forward"] + seconds["backward"] + seconds["waiting"]
                    tokens = gpus * EXAMPLES * (SOURCE + TARGET)
                    row += [f"{needed:.0f}", f"{step:.2f} s", f"{100 * seconds['waiting'] / step:.0f}%",
                            f"{tokens / step:,.0f}"]  # fmt: skip
                print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
