"""Parts of dashboards: panels, variables, annotations, and PromQL whose metrics are those of the catalogue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

from pipeline.metrics import INFO, LAG, Metric

RUNBOOK = "pipeline/docs/operations.md"
SCOPE = 'cluster=~"$cluster",app=~"$app",instance=~"$instance"'
TARGET = "cluster, app, job, instance"
SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

Panel: TypeAlias = timeseries.Panel | stat.Panel | table.Panel | heatmap.Panel


class Query(NamedTuple):
    """An expression, and how its series are named."""

    expr: str
    legend: str = ""


def of(metric: Metric | str, more: str = "", suffix: str = "") -> str:
    """Return the selector of a metric in the chosen clusters, apps and instances."""
    name = metric if isinstance(metric, str) else metric.name
    return f"{name}{suffix}{{{SCOPE}{',' if more else ''}{more}}}"


def summed(metric: Metric, function: Literal["rate", "increase"], over: str, by: str, *, always: bool) -> str:
    """Return the sum of a counter's rate or increase; with `always`, 0 where there is no series yet."""
    grouped = f"sum by ({by})" if by else "sum"
    return f"{grouped} ({function}({of(metric)}[{over}]))" + (" or vector(0)" if always else "")


def per_second(metric: Metric, legend: str, by: str = "", *, always: bool = False) -> Query:
    """Return the rate of a counter."""
    return Query(summed(metric, "rate", "$__rate_interval", by, always=always), legend)


def last_hour(metric: Metric, legend: str, by: str = "", *, always: bool = False) -> Query:
    """Return the increase of a counter in an hour."""
    return Query(summed(metric, "increase", "1h", by, always=always), legend)


def largest(metric: Metric, legend: str, by: str = "partition") -> Query:
    """Return the largest value of a gauge."""
    return Query(f"max by ({by}) ({of(metric)})", legend)


def smallest(metric: Metric, legend: str, by: str = "partition") -> Query:
    """Return the smallest value of a gauge."""
    return Query(f"min by ({by}) ({of(metric)})", legend)


def quantiles(metric: Metric, by: str = "", legend: str = "") -> list[Query]:
    """Return median and 99th percentile of a histogram."""
    grouped = f"sum by (le{', ' if by else ''}{by}) (rate({of(metric, suffix='_bucket')}[$__rate_interval]))"
    return [Query(f"histogram_quantile({q}, {grouped})", f"p{q * 100:.0f} {legend}".rstrip()) for q in (0.5, 0.99)]


def ours(expr: str) -> str:
    """Return only what an expression has of our processes: a day later those that are down are forgotten."""
    return f"{expr} and on ({TARGET}) count_over_time({INFO.name}[1d])"


def _queries(panel: Panel, queries: Sequence[Query], *, instant: bool, form: prometheus_models.PromQueryFormat) -> None:
    for number, query in enumerate(queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id(chr(ord("A") + number)).format(form).datasource(SOURCE)
        target = target.instant() if instant else target.range()
        panel.with_target(target.legend_format(query.legend or "__auto"))


def _described(panel: Panel, title: str, description: str, unit: str, alert: str, width: int, height: int) -> None:
    panel.title(title).description(description).unit(unit).datasource(SOURCE).span(width).height(height)
    if alert:
        link = dashboard.DashboardLink(f"Runbook: {alert}").type(models.DashboardLinkType.LINK).icon("doc")
        panel.links([link.url(f"{RUNBOOK}#{alert.lower()}").target_blank(True)])


def _thresholds(*steps: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    made = [models.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


def graph(
    title: str,
    description: str,
    queries: Query | Sequence[Query],
    *,
    unit: str = "short",
    alert: str = "",
    red: float | None = None,
    width: int = 8,
    height: int = 8,
    from_zero: bool = True,
) -> timeseries.Panel:
    """Return lines over time; `red` draws a threshold."""
    panel = timeseries.Panel().line_width(1).fill_opacity(10).show_points(common_models.VisibilityMode.NEVER)
    panel.legend(
        common.VizLegendOptions()
        .display_mode(common_models.LegendDisplayMode.LIST)
        .placement(common_models.LegendPlacement.BOTTOM)
        .show_legend(True)
    )
    panel.tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
    if from_zero:
        panel.min(0)
    if red is not None:
        panel.thresholds(_thresholds((None, "green"), (red, "red")))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(common_models.GraphTresholdsStyleMode.LINE))
    _described(panel, title, description, unit, alert, width, height)
    given = [queries] if isinstance(queries, Query) else queries
    _queries(panel, given, instant=False, form=prometheus_models.PromQueryFormat.TIME_SERIES)
    return panel


def number(
    title: str, description: str, query: Query, *, unit: str = "short", red: float, alert: str = "", width: int = 4
) -> stat.Panel:
    """Return one number as of now, red from `red` on; below 0 it is red up to there."""
    panel = stat.Panel().color_mode(common_models.BigValueColorMode.BACKGROUND)
    panel.graph_mode(common_models.BigValueGraphMode.NONE)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    steps = ((None, "green"), (red, "red")) if red > 0 else ((None, "red"), (-red, "green"))
    panel.thresholds(_thresholds(*steps))
    _described(panel, title, description, unit, alert, width, 5)
    _queries(panel, [query], instant=True, form=prometheus_models.PromQueryFormat.TIME_SERIES)
    return panel


def rows(title: str, description: str, query: Query, *, width: int, height: int, alert: str = "") -> table.Panel:
    """Return a table as of now."""
    panel = table.Panel()
    _described(panel, title, description, "short", alert, width, height)
    _queries(panel, [query], instant=True, form=prometheus_models.PromQueryFormat.TABLE)
    return panel


def heat(title: str, description: str, buckets: str, *, unit: str = "s", width: int = 12) -> heatmap.Panel:
    """Return a heat map of a histogram's buckets, as `sum by (le)` has them."""
    panel = heatmap.Panel().calculate(False).show_value(common_models.VisibilityMode.NEVER)
    panel.color(heatmap.HeatmapColorOptions().mode(heatmap_models.HeatmapColorMode.SCHEME).scheme("Oranges").steps(64))
    panel.y_axis(heatmap.YAxisConfig().unit(unit))
    _described(panel, title, description, unit, "", width, 8)
    _queries(panel, [Query(buckets, "{{le}}")], instant=False, form=prometheus_models.PromQueryFormat.HEATMAP)
    return panel


def heat_of(title: str, description: str, metric: Metric, *, width: int = 12) -> heatmap.Panel:
    """Return the heat map of one of our own histograms."""
    return heat(title, description, f"sum by (le) (increase({of(metric, suffix='_bucket')}[$__rate_interval]))", width=width)


def choice(
    name: str,
    label: str,
    query: str,
    description: str = "",
    *,
    regex: str = "",
    several: bool = True,
    everything: str | None = ".*",
) -> dashboard.QueryVariable:
    """Return a variable that Prometheus is asked for.

    With `several` it can be all: what the regular expression `everything` matches; None: those that there are.
    """
    made = dashboard.QueryVariable(name).label(label).datasource(SOURCE).regex(regex).description(description)
    made.query({"qryType": 5, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"})
    made.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
    if several:
        made.multi(True).include_all(True)
        if everything is not None:
            made.all_value(everything)
        made.current(models.VariableOption(text=["All"], value=["$__all"]))
    return made


def _annotation(name: str, expr: str, color: str) -> dashboard.AnnotationQuery:
    return dashboard.AnnotationQuery().name(name).datasource(SOURCE).enable(True).icon_color(color).expr(expr)


def board(name: str, title: str, description: str, of_instances: Metric | str) -> dashboard.Dashboard:
    """Return a dashboard without panels. Its clusters, apps and instances are those that have the metric `of_instances`."""
    has = of_instances if isinstance(of_instances, str) else of_instances.name
    made = dashboard.Dashboard(title).uid(f"pipeline-{name}").description(description).tags(["pipeline"]).editable()
    made.refresh("5s").time("now-15m", "now").timezone("browser").version(1).tooltip(models.DashboardCursorSync.CROSSHAIR)
    made.timepicker(dashboard.TimePicker().refresh_intervals(["5s", "10s", "30s", "1m", "5m"]))
    made.link(
        dashboard.DashboardLink("pipeline")
        .type(models.DashboardLinkType.DASHBOARDS)
        .tags(["pipeline"])
        .keep_time(True)
        .include_vars(True)
    )
    runbook = dashboard.DashboardLink("Runbook").type(models.DashboardLinkType.LINK).icon("doc").url(f"{RUNBOOK}#alerts")
    made.link(runbook.target_blank(True))
    made.with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    made.with_variable(choice("cluster", "Cluster", f"label_values({has}, cluster)"))
    made.with_variable(choice("app", "App", f'label_values({has}{{cluster=~"$cluster"}}, app)'))
    made.with_variable(choice("instance", "Instance", f'label_values({has}{{cluster=~"$cluster",app=~"$app"}}, instance)'))
    is_worker = of(INFO, 'role="worker"')
    worker = f"{of(LAG)} and on ({TARGET}) {is_worker}"
    started = f"changes({of('process_start_time_seconds')}[1m]) > 0"
    made.annotation(_annotation("Restarts", ours(started), "red"))
    made.annotation(_annotation("Rebalances", f"changes((count by ({TARGET}) ({worker}))[1m:5s]) > 0", "orange"))
    return made


def with_panels(made: dashboard.Dashboard, content: Sequence[str | Panel]) -> models.Dashboard:
    """Return the built dashboard: a text begins a row. Panels get rising ids."""
    for part in content:
        if isinstance(part, str):
            made.with_row(dashboard.Row(part))
        else:
            made.with_panel(part)
    built = made.build()
    for number_, panel in enumerate(built.panels or (), start=1):
        panel.id_val = number_
    return built
