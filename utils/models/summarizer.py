"""The summarizer: loading, setting up and saving a model of either kind, an encoder-decoder or a language model.

`wrap` gives both kinds one interface: `forward` (loss or logits of the targets), `generate`, and the plain model of
Transformers as `.model`.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

from utils.errors import UsageError
from utils.models.decoder_only import LanguageModel
from utils.models.encoder_decoder import EncoderDecoder, start_token
from utils.models.generation import DEFAULTS, most_new_tokens, settle_generation
from utils.models.languages import set_languages
from utils.models.lora import base_model, check_loaded, holds
from utils.models.settings import ATTENTION_DROPOUTS, load_error, saved_settings
from utils.models.sources import DEFAULT_PROMPT, Sources
from utils.models.tokenizer import check_length, check_vocabulary, position_limit

# the entries of a configuration that --dropout sets, as BART, T5, BERT and GPT-2 call it
DROPOUTS = ("dropout", "dropout_rate", "hidden_dropout_prob", "hidden_dropout", "resid_pdrop", "embd_pdrop",
            "resid_dropout", "embed_dropout")  # fmt: skip
# families whose own loss is another than cross entropy, or is computed otherwise
REFUSED = {
    "fsmt": "it is for translation, and has no output layer of its own",
    "nllb-moe": "the loss that balances its experts is not computed here",
    "prophetnet": "its loss also predicts later tokens",
    "switch_transformers": "the loss that balances its experts is not computed here",
    "xlm-prophetnet": "its loss also predicts later tokens",
}


def load_model_and_tokenizer(
    name_or_path: str,
    dropout: float | None = None,
    name: str = "--model_name_or_path",
    trust_remote_code: bool = False,
    attention_dropout: float | None = None,
):
    """Loads an encoder-decoder or a decoder-only model, and its tokenizer, from a folder or the Hub.

    `dropout` and `attention_dropout` replace the model's own. Raises UsageError, which names the flag `name`.
    """
    base = base_model(name_or_path, name)
    if Path(base).is_dir() and not Path(base, "config.json").exists():
        raise UsageError(
            f"{name} {name_or_path}: this folder holds no model; train_summarize.py writes it at the end of training"
        )
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        if why := REFUSED.get(config.model_type):
            raise ValueError(f"models of type {config.model_type} are not supported: {why}; choose another model")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        tokenizer.truncation_side = "right"  # a reference that is too long keeps its beginning
        if getattr(config, "attention_type", "") == "block_sparse":
            # BigBird would attend to all tokens for good once it has read a short source
            config.attention_type = "original_full"
        parts = [config, *(getattr(config, part) for part in ("encoder", "decoder") if hasattr(config, part))]
        for flag, value, names in (("dropout", dropout, DROPOUTS),
                                   ("attention_dropout", attention_dropout, ATTENTION_DROPOUTS)):  # fmt: skip
            entries = [(part, entry) for part in parts for entry in names if hasattr(part, entry)]
            is_default = value is None or (flag == "attention_dropout" and not value)
            if not is_default and not entries:
                raise ValueError(f"its configuration has no {flag} that --{flag} could set")
            for part, entry in entries if value is not None else ():
                setattr(part, entry, value)
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto_class.from_pretrained(
            name_or_path, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        if base != str(name_or_path) and holds(name_or_path, "generation_config.json"):  # adapters with their own
            model.generation_config = GenerationConfig.from_pretrained(name_or_path)
    except Exception as error:  # libraries raise errors of many kinds for files that they cannot use
        message = f"{name} {name_or_path}: no summarizer could be loaded: {load_error(error)}"
        raise UsageError(message) from error
    check_loaded(model, name_or_path, name)
    if not model.config.is_encoder_decoder and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never read
    check_vocabulary(tokenizer, model, f"{name} {name_or_path}")
    _check_special_tokens(model, tokenizer, f"{name} {name_or_path}")
    return model, tokenizer


def _check_special_tokens(model, tokenizer, name: str) -> None:
    """Raises UsageError if padding or an end are missing, or encoder and decoder do not share the tokenizer."""
    if model.config.model_type == "encoder-decoder":
        stacks = (model.get_encoder(), model.get_decoder())
        both = [stack.get_input_embeddings().weight.shape[0] for stack in stacks]
        if both[0] != both[1]:
            sizes = f"{both[0]:,} and {both[1]:,} tokens"
            raise UsageError(f"{name}: encoder and decoder have {sizes}, but one tokenizer must serve both")
    is_decoder_only = not model.config.is_encoder_decoder
    has_end = tokenizer.eos_token_id is not None or (not is_decoder_only and tokenizer.sep_token_id is not None)
    if tokenizer.pad_token_id is None or not has_end:
        raise UsageError(f"{name}: the tokenizer needs a pad token and an end token; set them and save it")
    if is_decoder_only:
        ends = model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if tokenizer.eos_token_id not in ends:  # training ends each summary with it
            ends = [*ends, tokenizer.eos_token_id]
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config.eos_token_id is None:
        raise UsageError(f"{name}: set eos_token_id in its generation_config.json, or no summary would end")


def set_up(model, tokenizer, settings: dict) -> None:
    """Sets the languages and the generation settings of a model, by the names of the flags; None is not set.

    Raises UsageError if a setting cannot be followed, or asks for more tokens than the model has positions.
    """
    name = model.config.name_or_path or "the new model"
    set_languages(model, tokenizer, settings["source_lang"], settings["target_lang"], name)
    settle_generation(model, {flag: settings[flag] for flag in DEFAULTS}, name)
    if model.config.is_encoder_decoder:
        if settings.get("prompt_template"):
            raise UsageError(f"--prompt_template: {name} is an encoder-decoder, which reads no prompt; leave it out")
        model.generation_config.decoder_start_token_id = start_token(model, name)
        # an encoder with windows of attention pads to a multiple
        window = getattr(model.get_encoder().config, "attention_window", 1)
        window = max(window) if isinstance(window, list | tuple) else window
        check_length(model.get_encoder(), "max_source_length", settings["max_source_length"], window)
        check_length(model.get_decoder(), "max_target_length", settings["max_target_length"])
        return
    if settings["fusion"] == "fid":
        raise UsageError(f"--fusion fid needs an encoder-decoder, and {name} is decoder-only: use --fusion concat")
    if settings["source_prefix"]:
        raise UsageError(f"--source_prefix: {name} reads a prompt; use --prompt_template")
    check_positions(model, settings["max_source_length"], max(settings["max_target_length"], most_new_tokens(model)))


def positions(model) -> int | None:
    """The most tokens that a language model has positions for; None if there is no limit.

    Beyond it, rotary positions are computed too, but were never trained.
    """
    trained = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return min((n for n in (trained, position_limit(model)) if n), default=None)


def default_source_length(model, written: int) -> int:
    """How many tokens a model reads that was not trained here, if it may write so many: 512, or a prompt of 1,024."""
    return 512 if model.config.is_encoder_decoder else min(1024, (positions(model) or 2048) - written)


def check_positions(model, read: int, written: int) -> None:
    """Raises UsageError if a language model has no positions for a prompt and a summary of so many tokens."""
    limit = positions(model)
    if limit is not None and read + written > limit:
        raise UsageError(
            f"--max_source_length {read} and a summary of {written} tokens: {model.config.name_or_path or 'the model'} "
            f"has positions for {limit} tokens in all; lower one of them"
        )


def wrap(model, gradient_checkpointing: bool = False) -> nn.Module:
    """The model with the interface of a summarizer; UsageError if it is of a kind that is not supported."""
    kind = EncoderDecoder if model.config.is_encoder_decoder else LanguageModel
    return kind(model, gradient_checkpointing)


def sources_for(summarizer: nn.Module, tokenizer, settings: dict) -> Sources:
    """What turns passages into the summarizer's input, by the names of the flags.

    The prompt of a language model is that of the settings, else the one that it was trained with, else DEFAULT_PROMPT.
    """
    prompt = None
    if not summarizer.model.config.is_encoder_decoder:
        folder = tokenizer.name_or_path  # not the model's, which is the base model's if it has adapters
        saved = saved_settings(folder) if folder else {}
        prompt = settings["prompt_template"] or saved.get("prompt_template") or DEFAULT_PROMPT
    return Sources(
        tokenizer, settings["fusion"], settings["max_source_length"], settings["passage_order"],
        settings["source_prefix"] or "", getattr(summarizer, "has_global_attention", False), prompt,
    )  # fmt: skip


def save_pretrained(summarizer: nn.Module, tokenizer, folder: str | Path, weights: dict) -> None:
    """Writes a folder that Transformers loads; `weights` is the summarizer's state dict."""
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    summarizer.model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
