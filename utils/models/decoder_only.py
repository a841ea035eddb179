"""Decoder-only language models as summarizers: the forward pass, loss and generation.

A source is a prompt (see `sources.Sources`), and the summary continues it. The loss is that of the summary's tokens
and its end only.
"""

import copy
import inspect
import warnings
from contextlib import nullcontext

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from utils.errors import in_one_line
from utils.fast.beam_search import cache_argument, prompted_search
from utils.fast.cpu import FunctionalDropout, laid_out_weights
from utils.fast.packing import laid_end_to_end, remove_padding_of_decoder
from utils.models.losses import label_smoothed_loss, vocabulary_loss
from utils.models.settings import Summarizer
from utils.models.tokenizer import pad


class LanguageModel(Summarizer):
    """Any decoder-only model of Transformers, with the interface of `encoder_decoder.EncoderDecoder`.

    It adds no parameters: `.model` can be saved and loaded without this class.
    """

    def __init__(self, model, gradient_checkpointing: bool = False):
        super().__init__(model, gradient_checkpointing)
        self.is_packed = remove_padding_of_decoder(model)
        self._check_loss()

    def lay_out(self, attention_mask, sequences_per_example, labels, **_) -> dict:
        """What `forward` must know of a batch on the host: lengths, and the places of real tokens.

        Made of a batch in the host's memory, before it goes to a GPU, it saves `forward` from waiting for the GPU.
        """
        real = labels != -100
        is_input = torch.cat([attention_mask != 0, real[:, 1:]], dim=1)
        # the last token of a prompt predicts the first target
        ends = attention_mask * (attention_mask.cumsum(1) == attention_mask.sum(1, keepdim=True)) * real[:, :1]
        predicts, positions = torch.cat([ends != 0, real[:, 1:]], dim=1), is_input.cumsum(1) - 1
        lengths = is_input.sum(1).tolist()
        if self.is_packed:
            places = predicts[is_input].nonzero()[:, 0]
        else:
            starts = torch.arange(len(labels), device=labels.device)[:, None] * max(lengths)
            places = (starts + positions)[predicts]
        return {
            "lengths": lengths, "read": is_input.flatten().nonzero()[:, 0], "positions": positions[is_input],
            "predicting": places, "written": real.flatten().nonzero()[:, 0],
        }  # fmt: skip

    def forward(
        self, input_ids, attention_mask, sequences_per_example, labels, label_smoothing_factor=None, layout=None
    ):
        """Logits (target tokens, vocabulary) at the targets, in the order of ``labels[labels != -100]``.

        With `label_smoothing_factor`: their `label_smoothed_loss` instead, with less memory and time. Prompts
        (examples, tokens) and `labels` are padded on the right. Without padding, the sequences of all examples, each a
        prompt and its targets but the last, lie end to end. `layout` is that of `lay_out`.
        """
        layout = layout or self.lay_out(attention_mask, sequences_per_example, labels)
        lengths, positions, places = (layout[name] for name in ("lengths", "positions", "predicting"))
        wants_logits = label_smoothing_factor is None or self.has_own_logits
        head, states = self.model.get_output_embeddings(), []
        ids = torch.cat([input_ids, labels[:, :-1]], dim=1).flatten().index_select(0, layout["read"])
        targets, within = labels.flatten().index_select(0, layout["written"]), nullcontext()
        if self.is_packed:
            inputs = {"input_ids": ids[None], "position_ids": positions[None]}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            within = laid_end_to_end(lengths)
        else:
            inputs = {name: pad_sequence(values.split(lengths), batch_first=True)
                      for name, values in (("input_ids", ids), ("position_ids", positions),
                                           ("attention_mask", torch.ones_like(ids)))}  # fmt: skip

        # The output layer is by far the widest. It gets those positions only, or a single one for vocabulary_loss.
        def keep_predicting(module, arguments):
            states.append(arguments[0].flatten(0, 1).index_select(0, places))
            return (states[0][None] if wants_logits else arguments[0][:1, :1],)

        fast_dropout = FunctionalDropout if labels.device.type == "cpu" and self.training else nullcontext
        handle = head.register_forward_pre_hook(keep_predicting)
        try:
            with within, fast_dropout():
                output = self.model(**inputs, use_cache=False)
        finally:
            handle.remove()
        if label_smoothing_factor is None:
            return output.logits[0]
        if wants_logits:
            return label_smoothed_loss(output.logits[0], targets, label_smoothing_factor)
        return vocabulary_loss(states[0], targets, label_smoothing_factor, head.weight)

    @torch.no_grad()
    def _check_loss(self) -> None:
        """Raises UsageError if the loss of random examples is not the model's own, or a token sees later ones."""
        model, was_training = self.model, self.model.training
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (2, 9), generator=torch.Generator().manual_seed(0)).to(model.device)
        mask, labels = torch.ones_like(ids), ids.masked_fill(torch.arange(9, device=ids.device) < 5, -100)
        model.eval()
        try:
            with warnings.catch_warnings(action="ignore"):
                own = model(input_ids=ids, attention_mask=mask, labels=labels)
                before = model(input_ids=ids[:, :5], attention_mask=mask[:, :5]).logits
            batch = {"input_ids": ids[:, :5], "attention_mask": mask[:, :5], "labels": ids[:, 5:],
                     "sequences_per_example": mask[:, 0]}  # fmt: skip
            ours = self(**batch, label_smoothing_factor=0.0)[0] / ids[:, 5:].numel()
            problem = (
                ""
                if (own.loss - ours).abs() <= 1e-4 * own.loss.abs()
                else f"its own loss is {own.loss:.4f}, here {ours:.4f}"
            )
            if not (own.logits[:, :5] - before).abs().max() <= 1e-3 * before.abs().max():
                problem = "a token sees those that follow it, so that it cannot write"
            if not self.is_packed and self._reads_padding(ids):
                problem = "it reads the padding of a batch, so that a summary would depend on the others"
        except Exception as error:  # models of others may raise anything
            problem = in_one_line(error)
        finally:
            model.train(was_training)
        self.refuse_if(problem)

    def _reads_padding(self, ids) -> bool:
        """Whether padding on the left, as `generate` wants it, changes what follows."""
        padded, mask = torch.cat([ids[:, :4], ids], 1), torch.ones_like(ids)
        mask = torch.cat([torch.zeros_like(ids[:, :4]), mask], 1)
        options = {}
        if "position_ids" in inspect.signature(self.model.forward).parameters:
            options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        shifted = self.model(input_ids=padded, attention_mask=mask, use_cache=False, **options).logits[:, -1]
        alone = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]
        return not (shifted - alone).abs().max() <= 1e-3 * alone.abs().max()

    @torch.no_grad()
    def log_likelihoods(self, prompts: list[list[int]], targets: list[list[list[int]]]) -> list[list[float]]:
        """Mean log-likelihood of a token, in nats, of each of the targets that may follow each prompt.

        The keys and values of a prompt are computed once for all of its targets. Only for models whose sequences can be
        laid end to end (`is_packed`).
        """
        model, device = self.model, self.model.device
        cache, name = DynamicCache(config=model.config), cache_argument(model)
        padded, is_prompt = _pad_left(prompts)
        places = (is_prompt.cumsum(1) - 1).clamp(min=0)
        last = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0][:, -1:],))
        try:
            first = model(
                input_ids=padded.to(device), attention_mask=is_prompt.to(device), position_ids=places.to(device),
                use_cache=True, **{name: cache},
            ).logits  # fmt: skip
        finally:
            last.remove()
        found = [[] for _ in prompts]
        for number in range(max(map(len, targets))):
            # a prompt with fewer targets takes its last one again
            now = [of_prompt[min(number, len(of_prompt) - 1)] for of_prompt in targets]
            labels = pad(now, 0)
            inputs, real = labels["input_ids"][:, :-1].to(device), labels["attention_mask"]
            logits = first
            if inputs.shape[1]:
                mask = torch.cat([is_prompt, real[:, :-1]], 1).to(device)
                positions = places[:, -1:].to(device) + 1 + torch.arange(inputs.shape[1], device=device)
                later = model(
                    input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=True,
                    **{name: copy.deepcopy(cache)},
                ).logits  # fmt: skip
                logits = torch.cat([first, later], 1)
            for i, target in enumerate(now):
                if number < len(targets[i]):
                    of_tokens = logits[i, : len(target)].log_softmax(-1, dtype=torch.float32)
                    chosen = of_tokens.gather(1, torch.tensor(target, device=device)[:, None])
                    found[i].append(chosen.mean().item())
        return found

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, sequences_per_example, **generation) -> torch.Tensor:
        """Generated token ids (examples, tokens), without the prompt; `generation` as in Transformers' `generate`.

        What is not given is taken from the model's generation_config. Prompts are padded on the right.
        """
        with laid_out_weights(self.model):
            return prompted_search(self.model, input_ids, attention_mask, **generation)


def _pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids padded on the left, and 1 at real tokens, both (rows, tokens)."""
    padded = pad([row[::-1] for row in rows], 0)
    return padded["input_ids"].flip(1), padded["attention_mask"].flip(1)
