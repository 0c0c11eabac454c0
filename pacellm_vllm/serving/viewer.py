"""``/plugins/pacellm/``: a page to look at requests with, and the words it shows."""

import base64
import binascii
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.datastructures import Headers

PAGE_ROUTE = "/plugins/pacellm/"
MOST_WORDS = 65536

_FILES = Path(__file__).parent / "viewer"
_TYPES = {
    "index.html": "text/html",
    "page.js": "text/javascript",
    "page.css": "text/css",
}
# Nothing from elsewhere, and nobody else's frame.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

router = APIRouter()


class WordsRequest(BaseModel):
    """Token ids, at most ``MOST_WORDS`` of them."""

    ids: list[int] = Field(max_length=MOST_WORDS)


@router.get(PAGE_ROUTE, include_in_schema=False)
@router.get(PAGE_ROUTE + "{name}.js", include_in_schema=False)
@router.get(PAGE_ROUTE + "{name}.css", include_in_schema=False)
async def page(request: Request) -> Response:
    """The page and its two files; a browser asks for the API key as a password of any user."""
    if not may_look(request):
        # Not raised: vLLM's handler of errors would drop the header.
        challenge = {"WWW-Authenticate": 'Basic realm="API key as the password"'}
        return PlainTextResponse("Unauthorized", 401, challenge)
    name = request.url.path.rpartition("/")[2] or "index.html"
    if name not in _TYPES:
        raise HTTPException(404, "Not Found")
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return FileResponse(_FILES / name, media_type=_TYPES[name], headers=headers)


@router.post(PAGE_ROUTE + "words")
async def words(request: Request, asked: WordsRequest) -> dict[str, Any]:
    """``{"words": [...]}``: each token's text by itself."""
    if not may_look(request):
        raise HTTPException(401, "Unauthorized")
    engine = request.app.state.pacellm.engine
    if engine is None or engine.renderer.tokenizer is None:
        raise HTTPException(501, "pacellm: this server has no tokenizer.")
    tokenizer = engine.renderer.tokenizer
    try:
        return {"words": [tokenizer.decode([token]) for token in asked.ids]}
    except (OverflowError, IndexError, KeyError, ValueError):
        raise HTTPException(400, "pacellm: ids must be token ids of this model.") from None


def may_look(request: Request) -> bool:
    """Whether a request carries the server's API key, as bearer or as a basic password."""
    authorized = request.app.state.pacellm.authorized
    if authorized(request.headers):
        return True
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "basic":
        return False
    try:
        key = base64.b64decode(given, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return False
    return authorized(Headers({"authorization": f"Bearer {key}"}))
