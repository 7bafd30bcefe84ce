"""The settings of an upload, checked against the base's tokenizer before the compiler sees it; who may set them."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from lora_serve.api.adapter_settings import find_tokens, find_tools, no_token
from lora_serve.api.caller import Caller
from lora_serve.api.error_handlers import Forbidden
from lora_serve.api.openai.chat_prompt import encode_chat
from lora_serve.api.openai.chat_schemas import Message
from lora_serve.api.services import Services
from lora_serve.api.upload import ReceivedUpload
from lora_serve.errors import AdapterInvalid, BadRequest
from lora_serve.names import ARCHIVE, SETTINGS
from lora_serve.serve_settings import MOST_BYTES, ServeSettings, parse_settings


async def check_uploaded_settings(upload: ReceivedUpload, services: Services, caller: Caller) -> None:
    """Check that the settings of an upload fit the base's tokenizer and chat template, as far as these are concerned.

    The compiler checks the rest. What it unpacks first, an archive of a source, is checked by it alone. A chat template
    runs in the process that serves all tenants, so it is none of an admin's who has some of the adapters only.

    Raises: AdapterInvalid that names the file and the setting; Forbidden.
    """
    path, of_all = upload.folder / SETTINGS, caller.adapters is None
    if upload.trust_settings and not of_all and (upload.folder / ARCHIVE).is_file():
        raise Forbidden("settings in an archive of a source need an admin key of all adapters", param="trust_settings")
    if not upload.trust_settings or not path.is_file():
        return
    settings = await asyncio.to_thread(_parse, path)
    if settings.chat_template is not None and not of_all:
        raise Forbidden(f"{SETTINGS}: chat_template needs an admin key of all adapters", param="settings")
    tools = await find_tools(services, (None, settings.added_tokens or ()))
    _, missing = find_tokens(tools.tokenizer, settings.stop_tokens or ())
    if missing is not None:
        raise AdapterInvalid(f"{SETTINGS}: {no_token(missing)}; see added_tokens", param="settings")
    if settings.system is None or settings.chat_template is not None:
        return
    if tools.chat is None:
        raise AdapterInvalid(f"{SETTINGS}: system: the base has no chat template; give one", param="settings")
    talk = [Message(role="system", content=settings.system), Message(role="user", content="Hello")]
    try:
        await encode_chat(replace(services, tokenizer=tools.tokenizer, encoder=tools.encoder, chat=tools.chat), talk)
    except BadRequest as error:
        raise AdapterInvalid(f"{SETTINGS}: system: {error.message}", param="settings") from None


def _parse(path: Path) -> ServeSettings:
    with path.open("rb") as file:
        return parse_settings(file.read(MOST_BYTES + 1))
