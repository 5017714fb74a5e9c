"""Policies: loading one, and writing its prompts.

`load_policy` takes a folder in Hugging Face layout, a hub id, or "embedded" (data/policy). Prompts
go through the chat template where the tokenizer has one. A terse policy, such as the embedded one,
reads bare questions; its tokenizer has a <locate> token, on which it reviews its own response.

Left out: few-shot prompts and system messages.

Try it alone:  python -m data.policies    # the prompt of a problem, as the embedded policy reads it
"""

import hashlib
from datetime import datetime
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Iterable

import torch
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from data.faults import UserError
from data.parallel import rank
from data.problems import Problem
from data.verifiers import DELIMITER, KINDS

EMBEDDED = Path(__file__).resolve().parent / "policy"

# ------------------------------------------------------------------------------------------ loading


def policy_source(name: str | Path) -> str:
    """What transformers loads for --model: a folder or hub id; "embedded" is data/policy."""
    return str(EMBEDDED) if name == "embedded" else str(name)


# What transformers, tokenizers, safetensors and torch raise for folders that are damaged, or of
# something else. Their own loading has no one type for it.
LOADING_FAULTS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RuntimeError,
    UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)


def load_policy(name: str | Path, dtype: torch.dtype = torch.float32):
    """(model on the CPU, tokenizer). Raises UserError with what to mend. Runs no code of the
    folder."""
    disable_progress_bar()  # of weight loading: a tiny model would print more bars than steps
    set_verbosity_error()  # check_weights says in a line what a report of theirs says in ten
    source = policy_source(name)
    if (Path(source) / "checkpoints").is_dir():
        raise UserError(f"--model {name}: a run directory; give one of its checkpoints/step_N")
    tokenizer = load_tokenizer(source, name)
    try:
        if (Path(source) / "generation_config.json").exists():
            GenerationConfig.from_pretrained(source)  # a damaged one is passed over below
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_weights names them
        )
    except LOADING_FAULTS as fault:
        raise cannot_load(name, fault)
    check_weights(model, info, name)
    check_tokenizer(model, tokenizer, name)
    return model, tokenizer


def load_tokenizer(source: str, name: str | Path):
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        tokenizer("1 + 1")  # some faults of its files show only here
        return tokenizer
    except LOADING_FAULTS as fault:
        raise cannot_load(name, fault)
    except Exception as fault:
        if type(fault) is not Exception:  # which is what tokenizers raises for a damaged file
            raise
        raise cannot_load(name, fault)


def cannot_load(name: str | Path, fault: BaseException) -> UserError:
    return UserError(
        f"--model {name}: cannot be loaded ({reason_of(fault)}); "
        "give a Hugging Face folder or hub id"
    )


def reason_of(fault: BaseException) -> str:
    """The first line of an error's message; the second where the first only says what failed."""
    lines = str(fault).strip().splitlines() or [type(fault).__name__]
    if lines[0].endswith(":") and len(lines) > 1:
        del lines[0]
    return lines[0].strip()[:300]


def check_weights(model, info: dict, name: str | Path) -> None:
    """Raises UserError unless each parameter was read from the folder, and is finite. info: what
    from_pretrained reports; a parameter that it does not find starts at random."""
    faults = []
    for kind in ("missing", "unexpected", "mismatched"):
        found = sorted(map(weight_name, info[f"{kind}_keys"]))
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            faults.append(f"{kind}: {', '.join(found[:3])}{more}")
    if faults:
        raise UserError(
            f"--model {name}: the weights do not fit its config.json ({'; '.join(faults)}); "
            "mend one of the two"
        )
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"--model {name}: {key} holds nan or inf; give weights from before that happened"
            )


def weight_name(key: str | tuple) -> str:
    """A key of from_pretrained's report. A mismatched one comes with two shapes."""
    if isinstance(key, str):
        return key
    name, saved, configured = key
    return f"{name} is {list(saved)}, not {list(configured)}"


def check_tokenizer(model, tokenizer, name: str | Path) -> None:
    """Raises UserError if the tokenizer cannot be used, or does not belong to the model."""
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"--model {name}: its tokenizer has no pad token; "
            "set one in tokenizer_config.json (the eos token will do)"
        )
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(
            f"--model {name}: the tokenizer has more tokens ({len(tokenizer)}) than the model has "
            f"embeddings ({embeddings}); they do not belong together"
        )
    if not all(type(token) is int for token in eos_of(model)):
        raise UserError(
            f"--model {name}: eos_token_id in generation_config.json is no token id; give a number"
        )


def check_saving(model, tokenizer, name: str) -> None:
    """Saves everything but the weights to a folder that is removed again: what a checkpoint cannot
    hold is said now, not after the first steps.

    Some generation configs on the hub have a temperature or top_p without do_sample, which
    transformers reads but does not save. The checkpoints then say do_sample: true.
    """
    generation = model.generation_config
    try:
        generation.validate(strict=True)
    except ValueError as fault:
        generation.do_sample = True
        if rank() == 0:
            print(f"--model {name}: do_sample becomes true ({reason_of(fault)})")
    with TemporaryDirectory() as folder:
        try:
            for part in (model.config, generation, tokenizer):
                part.save_pretrained(folder)
        except LOADING_FAULTS as fault:
            raise UserError(
                f"--model {name}: cannot be saved again ({reason_of(fault)}); "
                "mend its configuration files"
            )


def fingerprint(model, tokenizer) -> dict[str, str]:
    """What tells this policy apart for --resume: name of a part -> its content as text.

    Not the weights: a checkpoint holds those that are trained (the others: digest_of_weights). Not
    what changes with the machine or the library.
    """
    config = model.config.to_diff_dict()
    for key in ("transformers_version", "dtype"):
        config.pop(key, None)
    tokens = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    if tokenizer.is_fast:
        tokens.append(tokenizer.backend_tokenizer.to_str())
    return {"model config": repr(config), "tokenizer": repr(tokens)}


def digest_of_weights(model) -> str:
    """SHA-256 of a model's parameters, rounded to bf16: a GPU loads them so, a CPU in float32."""
    sha = hashlib.sha256()
    for parameter in model.parameters():
        rounded = parameter.detach().to("cpu", torch.bfloat16)
        sha.update(rounded.flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def check_head(model, name: str) -> None:
    """Raises UserError if the model changes logits after its head (a soft cap, a scale).

    loss.py runs body and head itself, so that the head runs only on trained tokens.
    """
    ids = torch.tensor([[1, 2, 3]]) % model.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        hidden = model.base_model(input_ids=ids).last_hidden_state
        ours = model.get_output_embeddings()(hidden)
    if not torch.allclose(ours.float(), logits.float(), rtol=1e-2, atol=1e-2):
        raise UserError(
            f"--model {name}: {type(model).__name__} changes the logits after its head, which the "
            "loss does not do; use another architecture"
        )


def longest_sequence(model, name: str) -> int:
    """Tokens that the model takes. Raises UserError if its config does not tell."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if type(longest) is not int or longest < 1:
        raise UserError(
            f"--model {name}: max_position_embeddings in its config.json is {longest}; "
            "write the longest sequence there, in tokens"
        )
    return longest


def eos_of(model) -> set[int]:
    """Token ids that end a response, as the model's generation config names them."""
    eos = model.generation_config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos} - {None}


def adapter_config(lora_rank: int):
    """peft's configuration of the adapters."""
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("--lora_rank needs the peft library: pip install peft")
    return LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")


def add_adapters(model, lora_rank: int) -> None:
    """LoRA adapters on all linear layers, float32, in place; everything else is frozen."""
    config = adapter_config(lora_rank)
    from peft import inject_adapter_in_model  # here: adapter_config says if peft is missing

    inject_adapter_in_model(config, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def save_adapters(weights: Iterable[tuple[str, torch.Tensor]], lora_rank: int, folder: str) -> None:
    """Writes adapters to a folder in peft's layout. weights: (name in the model, tensor)."""
    tensors = {}
    for name, weight in weights:
        tensors["base_model.model." + name.replace(".default.", ".")] = weight.cpu().contiguous()
    save_file(tensors, Path(folder) / "adapter_model.safetensors")
    adapter_config(lora_rank).save_pretrained(folder)


def layers_of(model) -> list[torch.nn.Module]:
    """The transformer layers of a model, in order."""
    names = model._no_split_modules or ()
    return [module for module in model.modules() if type(module).__name__ in names]


def checkpoint_layers(model) -> None:
    """Keeps only each layer's input for the backward, which runs the layer again; in place."""
    for layer in layers_of(model):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


# ------------------------------------------------------------------------------------------ prompts

INSTRUCTION = f"""{{question}}

Solve this step by step. Write {DELIMITER} at the end of each step of your reasoning. {{ending}}"""


def locate_token(tokenizer) -> int | None:
    """Id of <locate>, which a terse policy has; None for others."""
    found = tokenizer.convert_tokens_to_ids("<locate>")
    return None if found == tokenizer.unk_token_id else found


def encode_question(tokenizer, problem: Problem) -> list[int]:
    """Prompt token ids x0. A terse policy reads the bare question, others an instruction too."""
    if locate_token(tokenizer) is not None:
        return encode_text(tokenizer, problem.question)
    ending = KINDS[problem.kind].ending
    return encode_prompt(tokenizer, INSTRUCTION.format(question=problem.question, ending=ending))


def encode_text(tokenizer, text: str) -> list[int]:
    """Token ids of a text. Raises UserError for a word that a terse policy does not know."""
    ids = tokenizer(text)["input_ids"]
    if locate_token(tokenizer) is not None and tokenizer.pad_token_id in ids:
        raise UserError(
            f"the policy has no tokens for {text[:40]!r}: the embedded one reads chain-12 and its "
            "like only; give another --model"
        )
    return ids


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a user message, through the chat template if there is one."""
    text = without_special_tokens(tokenizer, text)
    if not tokenizer.chat_template:
        return encode_text(tokenizer, text)
    message = [{"role": "user", "content": text}]
    try:
        return tokenizer.apply_chat_template(
            message,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            strftime_now=fixed_date,
        )
    except (TemplateError, TypeError, ValueError) as fault:
        raise UserError(
            f"the chat template of the policy fails ({reason_of(fault)}); mend chat_template"
        )


def fixed_date(form: str) -> str:
    """The date for chat templates that write today's: a run must not depend on the day."""
    return datetime(2024, 7, 26).strftime(form)


def encode_turn(tokenizer, text: str) -> list[int]:
    """Token ids of a user message that follows a response, with what ends the response before it.

    The chat template is asked for a conversation, and what it writes after the response is taken.
    Without a template the message stands between empty lines.
    """
    text = without_special_tokens(tokenizer, text)
    if not tokenizer.chat_template:
        return tokenizer(f"\n\n{text}\n\n", add_special_tokens=False)["input_ids"]
    response = "(the response)"
    conversation = [
        {"role": "user", "content": "(the question)"},
        {"role": "assistant", "content": response},
        {"role": "user", "content": text},
    ]
    written = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=False, strftime_now=fixed_date
    )
    _, turn = written.split(response, 1)
    return tokenizer(turn, add_special_tokens=False)["input_ids"]


def without_special_tokens(tokenizer, text: str) -> str:
    """Special tokens in a text become a space: they would end the message that quotes it."""
    for token in tokenizer.added_tokens_decoder.values():
        if token.special and token.content != DELIMITER:
            text = text.replace(token.content, " ")
    return text


def encode_all(tokenizer, problems: list[Problem], context: int, source: str) -> list[list[int]]:
    """Prompt ids of every problem. Raises UserError where one leaves no room for a response."""
    prompts = []
    for problem in problems:
        try:
            ids = encode_question(tokenizer, problem)
        except UserError as fault:
            raise UserError(f"{source}, problem {problem.index + 1}: {fault}")
        prompts.append(ids)
        if not ids:
            raise UserError(
                f"{source}: the prompt of problem {problem.index + 1} has no tokens; remove it"
            )
        if len(ids) >= context:
            raise UserError(
                f"{source}: the prompt of problem {problem.index + 1} has {len(ids)} tokens, "
                f"the context is {context}; remove it, or raise --context where it is set"
            )
    return prompts


if __name__ == "__main__":
    problem = Problem(0, "mod97 1: +7 2: *3 start 41 .", "48 47", "integers")
    _, tokenizer = load_policy("embedded")
    print(problem.question, "->", encode_question(tokenizer, problem))
