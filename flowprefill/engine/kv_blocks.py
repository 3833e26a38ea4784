"""BlockPool: which request holds which KV block, which are reusable; the engine calls it.

Accounting only: blocks are ids ``0 .. num_blocks - 1`` whose storage is the native KV cache's.
Every block is in exactly one of three places: held by at least one reservation, on the free list,
or *evictable* (no reservation holds it, its content is still findable by its hash). A block's
hash covers all tokens up to its end, by chaining the hash of the block before it, and is a 128-bit
cryptographic one: no client can craft a prompt that collides with another user's.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from flowprefill.errors import PromptTooLong

TokenIds = Sequence[int] | NDArray[np.int32]

_HASH_BYTES = 16
_ROOT = b"\0" * _HASH_BYTES


@dataclass(slots=True, eq=False)
class Reservation:
    """The blocks of one request, from admission to its terminal event; only BlockPool changes it.

    Attributes:
        block_ids: the request's blocks in token order; a prefix of them may be shared.
        cached_tokens: prompt tokens whose KV was found in the cache; a multiple of block_tokens.
        hashes: chained hashes of the sequence's full blocks, as far as they were needed.
        committed_blocks: how many leading blocks have been offered to the cache (or came from it).
    """

    block_ids: list[int]
    cached_tokens: int
    hashes: list[bytes] = field(default_factory=list, repr=False)
    committed_blocks: int = 0
    is_released: bool = False
    _table: NDArray[np.int32] | None = field(default=None, repr=False)

    @property
    def table(self) -> NDArray[np.int32]:
        """`block_ids` as an array, which no one changes; made when there are more of them."""
        if self._table is None or len(self._table) != len(self.block_ids):
            self._table = np.array(self.block_ids, np.int32)
        return self._table


@dataclass(frozen=True, slots=True)
class BlockStats:
    """Where the blocks are, and how the prefix cache does.

    Attributes:
        total: blocks in the pool; always ``used + free + cached``.
        used: held by at least one reservation.
        free: hold nothing of use.
        cached: evictable: held by no reservation, findable by hash.
        queried_tokens: prompt tokens of all reservations made so far.
        hit_tokens: those of them found in the cache.
    """

    total: int
    used: int
    free: int
    cached: int
    queried_tokens: int
    hit_tokens: int


class BlockPool:
    """Hands out KV blocks, shares equal prompt prefixes, evicts the least recently used.

    Thread: not thread-safe; the engine's lock guards it. Nothing here blocks.
    Cost: every call is O(blocks of the request it is about).
    """

    def __init__(
        self, num_blocks: int, block_tokens: int, enable_prefix_cache: bool = True
    ) -> None:
        """Make a pool of free blocks.

        Args:
            num_blocks: blocks of the KV cache, >= 1.
            block_tokens: tokens per block, >= 1.
            enable_prefix_cache: False never shares a block.
        """
        if num_blocks < 1 or block_tokens < 1:
            message = f"BlockPool: num_blocks={num_blocks}, block_tokens={block_tokens}: both >= 1"
            raise ValueError(message)
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self._is_caching = enable_prefix_cache
        self._refs = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: lowest ids first
        self._evictable: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._queried_tokens = 0
        self._hit_tokens = 0

    def reserve(
        self, token_ids: TokenIds, extra_tokens: int, *, finds_prefix: bool = True
    ) -> Reservation | None:
        """Take all blocks for a prompt and the first tokens after it.

        The longest cached prefix of full blocks is shared, but never the whole prompt: its last
        token has to be computed, its logits are what the first token is sampled from.

        Args:
            token_ids: the prompt, at least one token.
            extra_tokens: room for generated tokens, >= 0.
            finds_prefix: False shares no block: every token of the prompt is to be computed.

        Returns:
            The reservation, or None when there are not enough blocks now (nothing changed).

        Raises:
            PromptTooLong: the pool as a whole is too small; nothing changed.
        """
        prompt_tokens = len(token_ids)
        needed = self.blocks_for(prompt_tokens + extra_tokens)
        if needed > self.num_blocks:
            raise PromptTooLong(
                f"prompt: {prompt_tokens} tokens and {extra_tokens} to generate need {needed} KV "
                f"blocks of {self.block_tokens} tokens, the KV cache has {self.num_blocks} "
                f"({self.num_blocks * self.block_tokens} tokens); shorten the prompt or raise "
                "kv_cache_gib",
                param="prompt",
            )
        hashes: list[bytes] = []
        shared = self._find_prefix(token_ids, hashes) if finds_prefix else []
        fresh = needed - len(shared)
        if fresh > self._takeable(shared, Counter()):
            return None
        for block in shared:  # first, so that eviction can't take them
            if self._refs[block] == 0:
                del self._evictable[block]
            self._refs[block] += 1
        block_ids = shared + [self._take_block() for _ in range(fresh)]
        cached_tokens = len(shared) * self.block_tokens
        self._queried_tokens += prompt_tokens if finds_prefix else 0
        self._hit_tokens += cached_tokens
        return Reservation(block_ids, cached_tokens, hashes, len(shared))

    def would_fit(
        self,
        token_ids: TokenIds,
        extra_tokens: int,
        *,
        finds_prefix: bool,
        without: Iterable[Reservation],
    ) -> bool:
        """Return whether `reserve` would succeed once others were released; changes nothing."""
        held = Counter(block for reservation in without for block in reservation.block_ids)
        shared = self._find_prefix(token_ids, []) if finds_prefix else []
        fresh = self.blocks_for(len(token_ids) + extra_tokens) - len(shared)
        return fresh <= self._takeable(shared, held)

    def cached_tokens(self, token_ids: TokenIds) -> int:
        """Return how many tokens `reserve` would find in the cache now; changes nothing."""
        return len(self._find_prefix(token_ids, [])) * self.block_tokens

    def grow(self, reservation: Reservation, total_tokens: int) -> bool:
        """Make room for a sequence of ``total_tokens``; does nothing when there is room already.

        Returns:
            False when there are not enough blocks now, or the pool is too small (nothing changed).
        """
        self._check_live(reservation)
        fresh = self.blocks_for(total_tokens) - len(reservation.block_ids)
        if fresh > self.available:
            return False
        reservation.block_ids.extend(self._take_block() for _ in range(fresh))
        return True

    def commit(
        self, reservation: Reservation, token_ids: TokenIds, computed: int | None = None
    ) -> None:
        """Make the full blocks whose KV has been computed findable for later prompts.

        Call it only once the device has written the KV: a reader may use a block right after.
        Where an equal block is cached already, that one stays and ours remains private.

        Args:
            reservation: whose blocks were filled.
            token_ids: the sequence from its first token on, prompt included. Only blocks that
                became full since the last call are looked at.
            computed: how many of these tokens are computed; None: all.
        """
        self._check_live(reservation)
        computed = len(token_ids) if computed is None else computed
        full = computed // self.block_tokens
        if full > len(reservation.block_ids):
            message = f"{computed} tokens computed in {len(reservation.block_ids)} KV blocks"
            raise ValueError(message)
        if not self._is_caching:
            return
        for index in range(reservation.committed_blocks, full):
            digest = self._chained_hash(token_ids, index, reservation.hashes)
            if digest not in self._block_of:
                block = reservation.block_ids[index]
                self._block_of[digest] = block
                self._hash_of[block] = digest
            reservation.committed_blocks = index + 1

    def release(self, reservation: Reservation) -> None:
        """Give a request's blocks back; the one place where blocks are freed.

        Tails become evictable before their heads: a prefix is useful without its continuation,
        not the other way round.

        Raises:
            RuntimeError: it was released before (a bug of ours).
        """
        self._check_live(reservation)
        reservation.is_released = True
        for block in reversed(reservation.block_ids):
            self._refs[block] -= 1
            if self._refs[block] > 0:
                continue
            if self._hash_of[block] is None:
                self._free.append(block)
            else:
                self._evictable[block] = None

    @property
    def stats(self) -> BlockStats:
        """Count blocks by place, and cache queries and hits in tokens. O(1)."""
        free, cached = len(self._free), len(self._evictable)
        used = self.num_blocks - free - cached
        return BlockStats(
            self.num_blocks, used, free, cached, self._queried_tokens, self._hit_tokens
        )

    @property
    def available(self) -> int:
        """How many blocks no reservation holds."""
        return len(self._free) + len(self._evictable)

    def blocks_for(self, tokens: int) -> int:
        """Return how many blocks so many tokens take."""
        return -(-tokens // self.block_tokens)

    def check(self) -> None:
        """Assert every invariant; for tests, O(num_blocks)."""
        free, evictable = set(self._free), set(self._evictable)
        assert len(free) == len(self._free), "a block is twice on the free list"
        for block in range(self.num_blocks):
            places = (self._refs[block] > 0, block in free, block in evictable)
            assert sum(places) == 1, f"block {block}: held, free, evictable = {places}"
            assert self._refs[block] >= 0, f"block {block} has {self._refs[block]} references"
            digest = self._hash_of[block]
            assert digest is None or self._block_of[digest] == block, f"block {block}: wrong hash"
            assert block not in free or digest is None, f"free block {block} is findable"
            assert block not in evictable or digest is not None, f"block {block} is lost"
        assert len(self._block_of) == sum(d is not None for d in self._hash_of), "stray hashes"

    def _takeable(self, shared: list[int], held: Counter[int]) -> int:
        """Return how many blocks there are besides `shared`, were `held` references given back."""
        freed = sum(self._refs[block] == times for block, times in held.items())
        idle_shared = sum(self._refs[block] == held[block] for block in shared)
        return self.available + freed - idle_shared

    def _find_prefix(self, token_ids: TokenIds, hashes: list[bytes]) -> list[int]:
        """Return the cached blocks the prompt starts with; hashes looked at go to `hashes`."""
        found: list[int] = []
        if not self._is_caching:
            return found
        for index in range((len(token_ids) - 1) // self.block_tokens):
            block = self._block_of.get(self._chained_hash(token_ids, index, hashes))
            if block is None:
                break
            found.append(block)
        return found

    def _chained_hash(self, token_ids: TokenIds, index: int, hashes: list[bytes]) -> bytes:
        """Return the hash of block `index`, whose predecessors' are in `hashes`; adds it there."""
        if index == len(hashes):
            start = index * self.block_tokens
            content = np.asarray(
                token_ids[start : start + self.block_tokens], dtype="<i4"
            ).tobytes()
            parent = hashes[-1] if hashes else _ROOT
            hashes.append(hashlib.blake2b(parent + content, digest_size=_HASH_BYTES).digest())
        return hashes[index]

    def _take_block(self) -> int:
        """Take a block that holds nothing, else the least recently used evictable one."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._evictable.popitem(last=False)
            digest = self._hash_of[block]
            assert digest is not None
            del self._block_of[digest]
            self._hash_of[block] = None
        self._refs[block] = 1
        return block

    @staticmethod
    def _check_live(reservation: Reservation) -> None:
        if reservation.is_released:
            message = "KV blocks of this reservation were released before"
            raise RuntimeError(message)
