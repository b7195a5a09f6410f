"""``GET /v1/models``: the one model that is loaded."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path

from streamllm.server.service import Service, service_of

router = APIRouter(tags=["OpenAI"])

Serving = Annotated[Service, Depends(service_of)]


@router.get("/v1/models", summary="List the model")
async def list_models(service: Serving) -> dict[str, Any]:
    """All models, which is one."""
    return {"object": "list", "data": [_shown(service)]}


@router.get("/v1/models/{id:path}", summary="Describe the model")
async def retrieve_model(id: Annotated[str, Path(max_length=1000)], service: Serving) -> dict[str, Any]:
    """One model, by its name."""
    service.check_model(id)
    return _shown(service)


def _shown(service: Service) -> dict[str, Any]:
    return {"id": service.model, "object": "model", "created": service.created, "owned_by": "streamllm"}
