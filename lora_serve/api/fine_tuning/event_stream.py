"""The events of a fine-tuning job as they happen, as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from lora_serve.api.fine_tuning.job_objects import event_object
from lora_serve.api.fine_tuning.job_queue import JobQueue

POLL = 0.25  # seconds between two looks at the log
AT_ONCE = 200  # events


async def event_stream(
    jobs: JobQueue, job: str, after: str | None, poll: float = POLL
) -> AsyncGenerator[dict[str, Any]]:
    """All events after one, oldest first, and new ones, until the job has finished or the server is about to end.

    Raises `UnknownJob` if the job is deleted meanwhile.
    """
    while True:
        over = jobs.store.find(job).finished or jobs.draining  # before looking: what is told now is still seen
        events = await asyncio.to_thread(jobs.store.events(job).newer, after, AT_ONCE)
        for id_, event in events:
            yield event_object(id_, event).model_dump()
            after = id_
        if over and not events:
            return
        if not events:
            await asyncio.sleep(poll)
