"""The views, one file each."""

from __future__ import annotations

from tui.view import View
from tui.views.flows import Flows
from tui.views.hosts import Hosts
from tui.views.identities import Identities
from tui.views.map import Map
from tui.views.policies import Policies
from tui.views.pulse import Pulse
from tui.views.query import Query
from tui.views.timeline import Timeline
from tui.views.why import Why

VIEW_TYPES: dict[str, type[View]] = {
    view.NAME: view for view in (Pulse, Flows, Why, Map, Policies, Identities, Timeline, Query, Hosts)
}
