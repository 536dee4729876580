"""The dashboard *Views*: the merged views, as Prometheus scrapes or reads them."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models import dashboard as models

from dashboards.source.parts import Panel, Query, board, choice, graph, heat, number, of, rows, with_panels
from pipeline.core.exposition import OMITTED, STALENESS

_SCOPE = 'job=~"$job",cluster=~"$cluster",app=~"$app",instance=~"$instance"'
_NOT_VIEWS = (
    f"up|scrape_(duration_seconds|samples_scraped|samples_post_metric_relabeling|series_added)|{OMITTED}|{STALENESS}"
)
# Windows that Prometheus reads remotely have no job: it may be empty.
_VIEW = '__name__="$view",job=~"$job|",$label=~"$value",cluster=~"$cluster",app=~"$app"'
_BUCKETS = f'{{__name__="$histogram",{_SCOPE}}}'


def views() -> models.Dashboard:
    """Return the dashboard."""
    made = board("views", "Views", "The merged views, as Prometheus scrapes them from a query server.", STALENESS)
    known = f'{{{_SCOPE},__name__!~"{_NOT_VIEWS}'
    jobs = f"label_values({of(STALENESS)}, job)"  # the others have metrics that are no views
    made.with_variable(choice("job", "Job", jobs, "The scrape of views.", everything=None))
    about = (
        "A counter (monotone sum) has the ending _total here, whatever its name. Views with windows are not listed: "
        "write their names."
    )
    made.with_variable(choice("view", "View", f'label_values({known}|.+_bucket"}}, __name__)', about, several=False))
    about = "A label of the view, to choose series by; instance is the query server."
    rest = "/^(?!(?:__name__|job)$).+$/"
    made.with_variable(choice("label", "Label", "label_names($view)", about, regex=rest, several=False))
    made.with_variable(
        choice("value", "Value", f'label_values({{__name__="$view",{_SCOPE}}}, $label)', "Values of the label.")
    )
    buckets = f'label_values({{{_SCOPE},__name__=~".+_bucket"}}, __name__)'
    made.with_variable(choice("histogram", "Histogram", buckets, "A view of kind histogram, by its buckets.", several=False))
    several = [models.VariableOption(text=text, value=text, selected=text == "20") for text in ("20", "100", "500")]
    limit = dashboard.CustomVariable("limit").label("Series").description("How many series are drawn, the largest ones.")
    made.with_variable(limit.values("20,100,500").options(several).current(several[0]))
    return with_panels(made, [*_values(known), *_histograms()])


def _values(known: str) -> list[str | Panel]:
    one = f"max without (instance, job) ({{{_VIEW}}})"
    rate = f'rate({{{_VIEW},__name__=~".+_(total|count|sum)"}}[$__rate_interval])'
    slope = f'deriv({{{_VIEW},__name__!~".+_(total|count|sum)"}}[$__rate_interval])'
    return [
        number(
            "Series", "Series of the view with the chosen label values.", Query(f"count({one})", "series"), red=1e9, width=6
        ),
        number(
            "Staleness",
            "Upper bound on the age of anything accepted that the scrape lacks, of the worst server. To it comes the "
            "time since the scrape. Red: the dashboard Health says why.",
            Query(f"max({of(STALENESS)})", "staleness"),
            unit="s",
            red=60,
            alert="PipelineStale",
            width=6,
        ),
        rows(
            "Views that are left out",
            "Views that Prometheus can't have, and why: reserved_label (a label begins with __), name_collision "
            "(another view has the name), series_max (raise openmetrics_series_max), unreadable (see the server's log)."
            " The query API has them.",
            Query(f"max by (view, reason) ({of(OMITTED)})"),
            width=12,
            height=5,
            alert="PipelineViewsLeftOut",
        ),
        graph(
            "$view",
            "The values, of the largest series. Where several servers are scraped, the largest of their answers is "
            "shown: they differ by what they have not followed yet.",
            Query(f"topk($limit, {one})"),
            width=24,
            height=10,
            from_zero=False,
        ),
        graph(
            "$view: change per second",
            "Of a counter its rate, from which restarts do not take away; of anything else the slope over the same "
            "time. A view that is no monotone sum should not be named _total: it would be taken for a counter here.",
            Query(f"topk($limit, max without (instance, job) ({rate} or {slope}))"),
            width=24,
            height=9,
            from_zero=False,
        ),
        rows("$view now", "The values now, largest first.", Query(f"sort_desc(topk($limit, {one}))"), width=16, height=10),
        rows(
            "All views",
            "Series that each view has, of the server that has most.",
            Query(f'max by (__name__) (count by (__name__, instance) ({known}"}}))'),
            width=8,
            height=10,
        ),
    ]


def _histograms() -> list[str | Panel]:
    grouped = f"sum by (le) (rate({_BUCKETS}[$__rate_interval]))"
    about = (
        "Of the chosen histogram, over all of its series, within the bounds of its buckets; q= of the query API is exact "
        "to its bound."
    )
    return [
        "Histogram",
        heat("$histogram", about, f"sum by (le) (increase({_BUCKETS}[$__rate_interval]))", unit="short"),
        graph(
            "$histogram: quantiles",
            about,
            [Query(f"histogram_quantile({q}, {grouped})", f"p{q * 100:.0f}") for q in (0.5, 0.9, 0.99)],
            width=12,
        ),
    ]
