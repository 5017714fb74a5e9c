"""Policies: loading one, and writing its prompts.

`load_policy` takes a folder in Hugging Face layout, a hub id, or "embedded" (data/policy). Prompts
go through the chat template where the tokenizer has one. A terse policy, such as the embedded one,
reads bare questions; its tokenizer has a <locate> token, on which it reviews its own response.

Left out: few-shot prompts and system messages.

Try it alone:  python -m data.policies    # the prompt of a problem, as the embedded policy reads it
"""

from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from data.faults import UserError
from data.problems import Problem
from data.verifiers import DELIMITER, KINDS

EMBEDDED = Path(__file__).resolve().parent / "policy"

# ------------------------------------------------------------------------------------------ loading


def policy_source(name: str | Path) -> str:
    """What transformers loads for --model: a folder or hub id; "embedded" is data/policy."""
    return str(EMBEDDED) if name == "embedded" else str(name)


def load_policy(name: str | Path, dtype: torch.dtype = torch.float32):
    """(model on the CPU, tokenizer). Raises UserError with what to mend."""
    disable_progress_bar()  # of weight loading: a tiny model would print more bars than steps
    source = policy_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as fault:
        reason = str(fault).strip().splitlines()[0]
        raise UserError(
            f"--model {name}: cannot be loaded ({reason}); give a Hugging Face folder or hub id"
        )
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
    return model, tokenizer


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


def eos_of(model) -> set[int]:
    """Token ids that end a response, as the model's generation config names them."""
    eos = model.generation_config.eos_token_id
    return set(eos) if isinstance(eos, list) else {eos} - {None}


def add_adapters(model, lora_rank: int) -> None:
    """LoRA adapters on all linear layers, float32, in place; everything else is frozen."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("--lora_rank needs the peft library: pip install peft")
    adapters = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
    inject_adapter_in_model(adapters, model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


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
        return tokenizer(problem.question)["input_ids"]
    ending = KINDS[problem.kind].ending
    return encode_prompt(tokenizer, INSTRUCTION.format(question=problem.question, ending=ending))


def encode_prompt(tokenizer, text: str) -> list[int]:
    """Token ids of a user message, through the chat template if there is one."""
    text = without_special_tokens(tokenizer, text)
    if not tokenizer.chat_template:
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=False
    )


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
        conversation, add_generation_prompt=True, tokenize=False
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
    prompts = [encode_question(tokenizer, problem) for problem in problems]
    for problem, ids in zip(problems, prompts):
        if len(ids) >= context:
            raise UserError(
                f"{source}: the prompt of problem {problem.index} has {len(ids)} tokens, "
                f"the model's context is {context}; remove it"
            )
    return prompts


if __name__ == "__main__":
    problem = Problem(0, "mod97 1: +7 2: *3 start 41 .", "47", "integer")
    _, tokenizer = load_policy("embedded")
    print(problem.question, "->", encode_question(tokenizer, problem))
