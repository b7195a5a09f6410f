"""``POST /tokenize`` and ``/detokenize``: texts to ids and back, in vLLM's shape."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends

from streamllm.errors import InputError
from streamllm.server.refusal import Refusal
from streamllm.server.service import Service, service_of
from streamllm.server.text_schema import DetokenizeRequest, TokenizeRequest

router = APIRouter(tags=["tokens"])

Serving = Annotated[Service, Depends(service_of)]


@router.post("/tokenize", summary="Spell a text in ids")
def tokenize(asked: TokenizeRequest, service: Serving) -> dict[str, Any]:
    """The ids of a text, or of messages as the model's chat template spells them."""
    if asked.model is not None:
        service.check_model(asked.model)
    tokenizer = service.engine.tokenizer
    if asked.prompt is not None:
        ids = tokenizer(asked.prompt, add_special_tokens=asked.add_special_tokens)["input_ids"]
    else:
        said = [{"role": each.role, "content": each.text} for each in asked.messages or ()]
        if not getattr(tokenizer, "chat_template", None):
            text = "".join(each["content"] for each in said)
            ids = tokenizer(text, add_special_tokens=asked.add_special_tokens)["input_ids"]
        else:
            try:
                ids = tokenizer.apply_chat_template(
                    said, add_generation_prompt=asked.add_generation_prompt, tokenize=True, return_dict=False
                )
            except Exception as error:  # a template is a program, and raises what it likes
                raise InputError(f"The model's chat template cannot spell these messages: {error}") from error
    strings = tokenizer.convert_ids_to_tokens(ids) if asked.return_token_strs else None
    most = getattr(service.engine.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return {"count": len(ids), "max_model_len": most, "tokens": list(ids), "token_strs": strings}


@router.post("/detokenize", summary="Spell ids as a text")
def detokenize(asked: DetokenizeRequest, service: Serving) -> dict[str, Any]:
    """The text of ids."""
    if asked.model is not None:
        service.check_model(asked.model)
    for index, id in enumerate(asked.tokens):
        if id >= service.vocabulary:
            raise Refusal(400, f"{id} is no id of this model.", param=f"tokens[{index}]")
    return {"prompt": service.engine.tokenizer.decode(asked.tokens)}
