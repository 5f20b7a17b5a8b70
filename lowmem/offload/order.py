"""In which order a model uses its weights, so that what comes next can be read ahead.

Nothing here is needed for a right result: a wrong guess costs time, never a number.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

# A use raises trust by one and a forward without one lowers it by two: what two forwards of three use is read ahead.
_GAIN, _LOSS = 1, 2
_MOST, _LEAST = 2, -4
# The first forward may use a unit several times (shared layers, loops), and each is a place of its own, up to so many.
_PLACES, _PLACES_PER_UNIT = 64, 4
# So many neighbours that come back one after the other are taken for a part that comes back as a whole; an expert is
# a few units, a vision tower or an encoder hundreds.
_TOGETHER = 8


class Order:
    """The order in which a model uses its weights: learned at the first forward, checked at every one after it.

    The first forward is written down as a sequence of places. Later ones move along it: what they pass over loses
    trust, what they use gains it, what they bring anew is put in where it came. So experts that a router picks by
    need are not read ahead for long, and a part that only some forwards use (an encoder at the first step of
    `generate`) is known again once its first few units came. A use costs the same however many units there are, but
    for the first of a forward, which looks at each place once. `upcoming` may run in another thread than `use`.
    """

    def __init__(self) -> None:
        self._units: list[int] = []
        # Of each place: its trust after the last use, and the forward of that use.
        self._trust: list[int] = []
        self._seen: list[int] = []
        # The places of each unit, ascending; none as long as it waits to be put in.
        self._places: dict[int, list[int]] = {}
        self._waiting: list[tuple[int, int]] = []
        # The places that are worth reading ahead in this forward.
        self._worth: list[int] = []
        self._cursor = 0
        self._forward = 0
        self._uses = 0
        self._learning = True
        self._begun = False
        # How many neighbours came back in a row, and the forward that had them last.
        self._together = 0
        self._back = 0

    def __contains__(self, unit: int) -> bool:
        """Whether the unit was ever used."""
        return unit in self._places

    def begin(self) -> None:
        """A forward of the whole model begins. It may never be called: then the first unit's use is the beginning.

        What came before the first call belongs to the first forward: `generate` runs an encoder by itself, then the
        model.
        """
        again, self._begun = self._begun, True
        if self._uses and (again or not self._learning):
            self._next_forward()

    def use(self, unit: int) -> bool:
        """`unit` is used now.

        Returns:
            Whether it came in its order, so that nothing was passed over that `upcoming` gave, or nothing was known
            yet.
        """
        places = self._places.get(unit)
        first = bool(self._units) and unit == self._units[0]
        # The first unit twice in a row is one beginning: a head that is tied to the embedding ends the forward before.
        if first and not self._begun and self._uses > 1:
            self._next_forward()
            places = self._places[unit]
        self._uses += 1
        if self._learning:
            if places is None or len(self._units) < _PLACES + _PLACES_PER_UNIT * len(self._places):
                self._append(unit)
                return True
            self._settle()
            places = self._places[unit]
        if not places:
            if places is None:
                self._places[unit] = []
                self._waiting.append((self._cursor, unit))
                if len(self._waiting) > len(self._units):
                    self._settle()
            self._together = 0
            return False
        return self._come_to(places)

    def upcoming(self) -> Iterator[int]:
        """What will be used after the last `use`, nearest first, each at most once, round to where it stands now.

        Only what is worth reading ahead; nothing during the first forward.
        """
        # Lists that are replaced and never changed once they are full, so that another thread's `use` cannot hurt.
        units, worth, seen, place = self._units, self._worth, self._seen, self._cursor
        given = set()
        if self._together >= _TOGETHER:
            back = self._back
            while place < len(units) and seen[place] == back:
                if units[place] not in given:
                    given.add(units[place])
                    yield units[place]
                place += 1
        begin = bisect_left(worth, place)
        for index in range(begin, begin + len(worth)):
            unit = units[worth[index % len(worth)]]
            if unit not in given:
                given.add(unit)
                yield unit

    def _append(self, unit: int) -> None:
        self._places.setdefault(unit, []).append(len(self._units))
        self._units.append(unit)
        self._trust.append(_GAIN)
        self._seen.append(self._forward)
        self._cursor = len(self._units)

    def _come_to(self, places: list[int]) -> bool:
        """Move to the nearest of these places, ahead if there is one."""
        index = bisect_left(places, self._cursor)
        ahead = index < len(places)
        place = places[index] if ahead else places[-1]
        in_order = ahead or (places[0] == 0 and self._cursor == len(self._units))
        if not ahead and places[0] == 0:
            # Round to the beginning without being told.
            unit = self._units[0]
            self._settle()
            place = self._places[unit][0]
            self._cursor = 0
        if in_order:
            next_worth = bisect_left(self._worth, self._cursor)
            in_order = next_worth == len(self._worth) or self._worth[next_worth] >= place
        before = self._seen[place]
        missed = max(0, self._forward - before - 1)
        returns = bool(missed) and place == self._cursor and before == self._back
        self._together = self._together + 1 if returns else int(bool(missed))
        self._back = before
        self._trust[place] = min(_MOST, max(_LEAST, self._trust[place] - _LOSS * missed) + _GAIN)
        self._seen[place] = self._forward
        self._cursor = place + 1
        return in_order

    def _next_forward(self) -> None:
        self._forward += 1
        self._settle()
        self._cursor = self._uses = self._together = 0

    def _settle(self) -> None:
        """Put in what waits, and find what is worth reading ahead: it was used in the forward before, and has trust."""
        self._learning = False
        if self._waiting:
            self._put_in()
        last = self._forward - 1
        found = enumerate(zip(self._trust, self._seen, strict=True))
        self._worth = [place for place, (trust, seen) in found if trust > 0 and seen >= last]

    def _put_in(self) -> None:
        units: list[int] = []
        trust: list[int] = []
        seen: list[int] = []
        begin = 0
        # In the order of their places; those of one place as they came.
        for place, unit in sorted(self._waiting, key=lambda pair: pair[0]):
            units += [*self._units[begin:place], unit]
            trust += [*self._trust[begin:place], 0]
            seen += [*self._seen[begin:place], self._forward]
            begin = place
        self._cursor += sum(place <= self._cursor for place, _ in self._waiting)
        self._units = units + self._units[begin:]
        self._trust = trust + self._trust[begin:]
        self._seen = seen + self._seen[begin:]
        self._waiting = []
        self._places = {}
        for place, unit in enumerate(self._units):
            self._places.setdefault(unit, []).append(place)
