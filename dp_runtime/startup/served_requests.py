"""ServedRequests: a rank's requests and all that it keeps of them, from one epoch to the next."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.core.per_request_state import PerRequestState
from dp_runtime.core.rank_events.kv_events import KvEvent
from dp_runtime.core.rank_events.rank_load import RankLoad
from dp_runtime.metrics.totals import Recorder
from dp_runtime.prefix_cache.page_events import PageEvents
from dp_runtime.runner.drafting import DraftState
from dp_runtime.runner.image_encoding import ImageEncoding
from dp_runtime.sampling.sampler import Sampler
from dp_runtime.scheduler.abandonment import abandon_steps
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.startup.loaded_rank import LoadedRank
from dp_runtime.startup.rank_plan import RankPlan
from dp_runtime.structured.grammar_compiler import GrammarCompiler
from dp_runtime.structured.structured_state import StructuredState


@dataclass(frozen=True, eq=False)
class ServedRequests:
    scheduler: Scheduler
    sampler: Sampler
    structured: StructuredState
    drafts: DraftState | None
    recorder: Recorder
    image_features: Tensor  # [slots, hidden], where the scheduler's images lie

    @classmethod
    def none(cls, plan: RankPlan, loaded: LoadedRank) -> ServedRequests:
        device, num_rows = torch.device(plan.device), plan.limits.num_table_rows
        sampler = Sampler(plan.model.vocab_size, num_rows, device)
        info = loaded.info
        compiler = GrammarCompiler(info.tokenizer_json, info.vocab_size, info.eos_token_ids)
        structured = StructuredState(compiler, info.vocab_size)
        states: list[PerRequestState] = [sampler, structured]
        drafts = None
        if loaded.models.draft is not None:
            drafts = DraftState(loaded.models.draft, num_rows, device)
            states.append(drafts)
        scheduler = Scheduler(plan.pages, plan.limits, states, plan.prefix_cache.hasher)
        if plan.prefix_cache.is_followed:
            scheduler.page_table.allocator.cache.follow(PageEvents(plan.pages.page_size))
        recorder = Recorder(plan.dp_rank)
        size = plan.limits.num_image_slots, plan.model.hidden_size
        features = torch.zeros(size, dtype=plan.dtype, device=device)
        return cls(scheduler, sampler, structured, drafts, recorder, features)

    def take_kv_events(self) -> tuple[KvEvent, ...]:
        """Return how the prefix cache has changed since the last call, for any thread."""
        events = self.scheduler.page_table.allocator.cache.events
        return () if events is None else events.pending.take()

    def load(self, num_coming: int) -> RankLoad:
        """Tell how busy the rank is, for any thread; `num_coming` are not in its queue yet."""
        scheduler = self.scheduler
        num_waiting = len(scheduler.waiting) + num_coming
        return RankLoad(len(scheduler.running), num_waiting, scheduler.num_free_pages)

    def abandon_steps(self) -> None:
        """Forget the steps in flight, for the next epoch to begin where committed ones ended."""
        abandon_steps(self.scheduler)

    def image_encoding(self, plan: RankPlan, loaded: LoadedRank) -> ImageEncoding | None:
        encoder, wanted = loaded.models.target.vision, plan.images
        if encoder is None or wanted is None:
            return None
        return ImageEncoding(encoder, wanted, self.image_features, plan.limits.max_encoded_tokens)
