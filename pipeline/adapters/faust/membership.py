"""Membership in a Kafka group by Faust: decides which partitions are active or standby here, and moves no data.

There are three threads: `pipeline-membership` (Faust's loop), aiokafka's (heartbeats), and one that calls the listener, so
that a listener that hangs holds up neither of the others.

The group uses Kafka's eager protocol: before each rebalance all partitions are revoked, and the group waits until all
members have done so. `on_revoked` therefore has a deadline, after which the rebalance goes on regardless.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_futures
from typing import Any

from faust.auth import Credentials, OAuthCredentials, SASLCredentials, SSLCredentials
from yarl import URL

from pipeline.adapters.faust.app import MemberApp, Ours
from pipeline.adapters.faust.errors import limit_logging, translate
from pipeline.adapters.faust.member_metadata import CLIENT, NOWHERE, refusal
from pipeline.adapters.faust.security import PLAIN, Security
from pipeline.core.codec import FORMAT
from pipeline.errors import Fenced, Invalid, PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Member, MembershipListener
from pipeline.threads import Failures

_log = logging.getLogger(__name__)
_INTERVAL_S = 0.5
"""Time between checks that Faust and the coordinator's tasks are alive: they report their end to no other caller."""
_HEARTBEAT_S_MAX = 1.0
"""Longest time between heartbeats. By them a member learns of a rebalance, which excludes members that come late."""
_END_S = 15.0
_NEVER_S = 1e6
"""Interval for aiokafka's limit between polls, which must not end a member that polls nothing."""


def _credentials(it: Security) -> Credentials | None:
    if it.tokens is not None:
        return OAuthCredentials(oauth_cb=it.provider(), ssl_context=it.context)
    if it.mechanism:
        return SASLCredentials(
            username=it.username, password=it.password.reveal(), ssl_context=it.context, mechanism=it.mechanism
        )
    return SSLCredentials(it.context) if it.context is not None else None


class FaustMembership:
    """A member of the group `app`, until it is stopped or fails.

    `name` must be unique among the members. With `static` it is the member's `group.instance.id`, so that a restart within
    `session_timeout_ms` moves nothing, and `taken` returns the names of all static members. `url` is the address of its
    status. `standby_count` copies of each partition are kept if there are enough members. `listener.on_revoked` may take
    `revoke_timeout_ms`; so may the agents of `app_of_agents`, before it.
    """

    def __init__(
        self,
        bootstrap: str,
        app: str,
        *,
        deltas: str,
        changelog: str,
        name: str,
        static: bool = False,
        taken: Callable[[], Collection[str]] = frozenset,
        security: Security = PLAIN,
        format: int = FORMAT,
        url: str = "",
        standby_count: int = 1,
        session_timeout_ms: int,
        rebalance_timeout_ms: int = 15_000,
        revoke_timeout_ms: int = 3_000,
        metadata_refresh_ms: int = 10_000,
        app_of_agents: MemberApp | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        self._failures = Failures(_log, "pipeline-membership", metrics)
        self._group, self._name, self._static = app, name, static
        self._taken = taken
        self._session_s = session_timeout_ms / 1000
        self._revoke_timeout_s = revoke_timeout_ms / 1000
        self._ours = Ours(deltas, changelog, self._on_assigned, format, self._revoke_timeout_s)
        self._options: dict[str, Any] = {
            "broker": [f"kafka://{server}" for server in bootstrap.split(",")],
            "broker_session_timeout": self._session_s,
            "broker_heartbeat_interval": min(self._session_s / 10, _HEARTBEAT_S_MAX),
            "broker_rebalance_timeout": rebalance_timeout_ms / 1000,
            "broker_max_poll_interval": _NEVER_S,
            "broker_request_timeout": max(30.0, self._session_s),
            "broker_client_id": f"{app}{CLIENT}{name}",
            "broker_credentials": _credentials(security),
            "consumer_group_instance_id": name if static else None,
            "consumer_metadata_max_age_ms": metadata_refresh_ms,
            "canonical_url": URL(url or NOWHERE).with_fragment(name),
            "table_standby_replicas": standby_count,
            "topic_allow_declare": False,
            "topic_disable_leader": True,
            "web_enabled": False,
            "stream_wait_empty": False,
            "stream_recovery_delay": 0.0,
            "store": "memory://",
        }
        self._listener: MembershipListener | None = None
        self._calls = ThreadPoolExecutor(1, thread_name_prefix="pipeline-listener")
        self._thread = threading.Thread(target=self._run, name="pipeline-membership", daemon=True)
        self._loop = asyncio.new_event_loop()
        self._stopping = threading.Event()
        self._failed: PipelineError | None = None
        self._app = app_of_agents or MemberApp()
        self._faust: MemberApp | None = None
        self._actives: frozenset[int] = frozenset()
        self._generation = -1
        self._last_check_s = 0.0
        self._slept_s = -_NEVER_S
        """Time at which the process was found to have stood still for longer than a session."""
        self._leave = False

    def start(self, listener: MembershipListener) -> None:
        limit_logging()
        self._listener = listener
        self._thread.start()

    def stop(self, *, leave: bool, timeout_s: float) -> bool:
        done = True
        if self._thread.ident is not None:
            if not self._stopping.is_set() and self._failed is None:
                revoked = self._call("on_revoked", self._actives, self._revoke_timeout_s)
                done = not wait_futures([revoked], self._revoke_timeout_s).not_done
            self._leave = leave or not self._static
            self._stopping.set()
            self._thread.join(timeout_s)
        self._calls.shutdown(wait=False, cancel_futures=True)
        return done and not self._thread.is_alive()

    def set_warm(self, partitions: frozenset[int]) -> None:
        self._ours.warm = partitions
        self._ask()

    def _ask(self) -> None:
        """Ask for a rebalance if we have too few partitions, and warm copies of some that the group does not know of.

        `announced_warm` is what the group knows: aiokafka forgets a request that comes while the group is being joined.
        """
        app = self._faust
        if app is None or app.coordinator is None or self._ours.warm <= self._ours.announced_warm:
            return
        most = max((len(member.actives) for member in app.members()), default=0)
        if most > len(self._actives) + 1:
            app.in_consumer_thread(app.coordinator.request_rejoin)

    def members(self) -> list[Member]:
        return [] if self._faust is None else self._faust.members()

    # In Faust's thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # Faust ends programs with SystemExit
            self._failures.note(error, consequence="membership ends")
            self._fail(Unavailable(f"membership in group {self._group!r} ended: {error!r}"))

    async def _serve(self) -> None:
        app = self._app
        try:
            app.join(self._group, ours=self._ours, loop=self._loop, **self._options)
        except PipelineError as error:
            self._fail(error)
            return
        self._faust = app
        app.on_partitions_revoked.connect(self._on_revoked, weak=False)
        starting = asyncio.ensure_future(app.start())
        try:
            self._last_check_s = self._loop.time()
            while not self._stopping.is_set() and self._failed is None:
                self._note_sleep()
                await asyncio.sleep(_INTERVAL_S / 10 if self._generation < 0 else _INTERVAL_S)
                if starting.done():
                    starting.result()
                app.probe()
        except PipelineError as error:
            self._fail(error)
        except Exception as error:
            ours = translate(error, self._group, f"membership in group {self._group!r} ended")
            _log.log(logging.INFO if isinstance(ours, Invalid) else logging.ERROR, "membership ends", exc_info=error)
            self._fail(ours)
        starting.cancel()
        if isinstance(self._failed, Fenced):
            return  # its consumer is held where it is: going on, even to end, it would join again
        await app.settle(self._revoke_timeout_s)
        if self._leave and app.coordinator is not None:
            # aiokafka never lets a static member leave (KIP-345); the broker takes it from one that does not say it is.
            app.coordinator._group_instance_id = None
        await asyncio.wait_for(app.stop(), _END_S)

    def _fail(self, error: PipelineError) -> None:
        if self._failed is None and not self._stopping.is_set():
            self._failed = error
            self._call("on_failed", error)

    def _call(self, method: str, *arguments: object) -> Future[None]:
        def called() -> None:
            try:
                getattr(self._listener, method)(*arguments)
            except BaseException as error:
                # The group believes that this member follows its assignment. Its end gives the partitions to others.
                self._failures.note(error, consequence=f"{method} was not carried out, the worker ends")
                if method != "on_failed":
                    self._fail(Unavailable(f"membership in group {self._group!r}: {method} failed: {error!r}"))

        return self._calls.submit(called)

    async def _on_revoked(self, *_: Any, **__: Any) -> None:
        """Revoke our partitions. Awaited before the group is joined again, as the eager protocol demands."""
        coordinator = None if self._faust is None else self._faust.coordinator
        revoked = None
        if self._actives and not self._stopping.is_set():
            revoked = self._call("on_revoked", self._actives, self._revoke_timeout_s)
        if self._generation >= 0 and coordinator is not None and coordinator.generation < 0:
            why = await self._why_not_again()
            if why:
                self._fail(Fenced(f"member {self._name!r} of group {self._group!r} {why}"))
                await asyncio.Event().wait()
        if revoked is not None:
            waited = await asyncio.wait([asyncio.wrap_future(revoked)], timeout=self._revoke_timeout_s)
            if waited[1]:
                _log.warning("partitions are handed over although %.1f s were not enough", self._revoke_timeout_s)

    def _note_sleep(self) -> None:
        now_s = self._loop.time()
        if now_s - self._last_check_s > self._session_s:
            self._slept_s = now_s
        self._last_check_s = now_s

    async def _why_not_again(self) -> str:
        """Return why a member that the group has forgotten must not join again; empty if it may.

        A broker that stood still forgets all of its members, and they may go on. But the name may have gone to another
        member meanwhile: joining would take it back, the other would do the same, and so on without end. aiokafka's
        heartbeats do not carry the name, so that the broker can't tell the two cases apart.
        """
        self._note_sleep()
        if self._loop.time() - self._slept_s < self._session_s:
            return "stood still for longer than its session"
        if self._static and await self._name_is_taken():
            return "gave way to another worker of the same name: each needs its own"
        _log.warning("group %r has forgotten member %r: joining again", self._group, self._name)
        return ""

    async def _name_is_taken(self) -> bool:
        while not self._stopping.is_set():
            try:
                return self._name in await self._loop.run_in_executor(None, self._taken)
            except Unavailable as error:
                _log.warning("who is in group %r is not known: %s", self._group, error)
                await asyncio.sleep(_INTERVAL_S)
            except PipelineError as error:
                _log.error("who is in group %r can't be known: %s", self._group, error)
                break
        return True

    def _on_assigned(self, generation: int) -> None:
        app = self._faust
        if app is None or generation != app.consumer_generation_id or self._stopping.is_set():
            return  # another rebalance has begun
        refused = refusal(self._ours.identity, app.rules, self._group)
        if refused is not None:
            self._leave = True  # also a static member: it will not be back as it is
            self._fail(refused)
            return
        self._generation, self._actives = generation, app.actives()
        self._call("on_assigned", self._actives, app.standbys(), generation)
        self._ask()
