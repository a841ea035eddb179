"""Languages of multilingual summarizers: the codes in sources and targets, and the token that a summary starts with."""

import difflib

from utils.errors import UsageError


def set_languages(model, tokenizer, source_lang: str | None, target_lang: str | None, name: str) -> None:
    """Makes the tokenizer mark sources and targets with these languages, and generation start in the target language.

    mBART-50, M2M100 and NLLB put the target's code behind the start token (`forced_bos_token_id`); mBART-25 starts
    with it (`decoder_start_token_id`). Raises UsageError, which names `name`, if a language is missing, unknown, or
    given for a tokenizer without languages.
    """
    given = {"source_lang": source_lang, "target_lang": target_lang}
    codes = language_codes(tokenizer)
    if not codes:
        if any(given.values()):
            raise UsageError(f"--source_lang and --target_lang: the tokenizer of {name} has no languages")
        return
    for flag, code in given.items():
        if code is None:
            some = ", ".join(list(codes)[:5])
            raise UsageError(f"{name}: the tokenizer has languages: set --source_lang and --target_lang ({some}, ...)")
        if code not in codes:
            near = difflib.get_close_matches(code, codes, n=3, cutoff=0.4) or list(codes)[:5]
            raise UsageError(f"--{flag} {code}: {name} has no such language; some are {', '.join(near)}")
    if getattr(tokenizer, "legacy_behaviour", False):  # of NLLB: the code at the end, unlike in pretraining
        tokenizer.legacy_behaviour = False
    tokenizer.tgt_lang = target_lang
    tokenizer.src_lang = source_lang
    target, generation = codes[target_lang], model.generation_config
    if tokenizer(text_target="a")["input_ids"][0] == target:
        generation.forced_bos_token_id = target
    else:  # the code is at the end of a target, and moves to the front of the decoder's input
        model.config.decoder_start_token_id = generation.decoder_start_token_id = target
        generation.forced_bos_token_id = None


def language_codes(tokenizer) -> dict[str, int]:
    """The language codes of a tokenizer with the ids of their tokens; empty if it has no languages."""
    if not hasattr(tokenizer, "src_lang"):
        return {}
    if codes := getattr(tokenizer, "lang_code_to_id", None):  # M2M100's tokens differ from its codes
        return dict(codes)
    named = set(tokenizer.special_tokens_map.values()) if hasattr(tokenizer, "special_tokens_map") else set()
    return {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens
            if token not in named}  # fmt: skip
