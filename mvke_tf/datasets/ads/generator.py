# SPDX-License-Identifier: Apache-2.0
"""An ad log of any size whose true probabilities are known.

Users have a few weighted interests, ads a few categories, and two tables say how much each interest favours each
category: one for clicks, one for installs after a click. Their correlation is `agreement`. What counts for a row is the
interest that the ad's categories suit best, a smooth maximum, so that different ads ask for different sides of one
user:

    affinity = log( sum_m w_m exp(s * favour[interest_m, categories]) ) / s

On top of that come the quality of the ad and its advertiser, slot, hour, device and age of the user, and a drift of
each category with the day. Ads and users turn up over time; some are new in the last days only.

Rows are made in blocks that depend on the settings and their own number alone, and are written as they are made: memory
is that of the users and of one block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from mvke_tf.errors import DeclarationError
from mvke_tf.io import atomic_write

# Changes whenever the same settings make another log.
FORMAT = 1
TOPICS = (
    *("sport", "news", "games", "music", "travel", "food", "fashion", "finance", "cars", "health", "science"),
    *("movies", "gardening", "parenting", "pets", "politics"),
)
GENDERS, DEVICES = ("f", "m", "x"), ("phone", "tablet", "desktop", "television")
SLOTS = ("feed_top", "feed", "story", "banner")
# Few are large: the n-th has a share in proportion to 1 / n.
CITIES = 200
_CITY_SHARES = 1 / np.arange(1, CITIES + 1) / (1 / np.arange(1, CITIES + 1)).sum()
FIRST_DAY = datetime.date(2026, 1, 5)
_DAY = 86_400
_BLOCK = 2**18
_SHARPNESS = 3.0
# Rows at each hour of the day, relative.
_BY_HOUR = 1.2 + np.cos((np.arange(24) - 20) / 24 * 2 * np.pi)
_NOISE_OF_REVENUE = 0.5
# Streams of chance.
_WORLD, _USERS, _CALIBRATION, _ROWS = range(4)


@dataclasses.dataclass(frozen=True)
class AdLog:
    """What a log is like.

    Args:
        rows: Number of impressions.
        users: Number of users; 0 for one per 40 rows, at most two million.
        ads: Number of ads; 0 for one per 1,000 rows, 50 to 20,000.
        days: Number of days, from 2026-01-05 on.
        interests: Interests of each user, 1 to 8.
        agreement: Correlation of what makes users click with what makes them install, -1 to 1.
        drift: How far the appeal of a category moves over the days, in log-odds of a click.
        cold: Share of the users and of the ads that turn up after the first day.
        signal: Scale of what a click and an install depend on, in log-odds; 0 for pure chance.
        click_rate: Mean probability of a click.
        install_rate: Mean probability of an install after a click.
        seed: Seed of everything.

    Raises:
        DeclarationError: If a value is out of its range.
    """

    rows: int = 200_000
    users: int = 0
    ads: int = 0
    days: int = 14
    interests: int = 3
    agreement: float = 0.5
    drift: float = 0.5
    cold: float = 0.3
    signal: float = 1.0
    click_rate: float = 0.1
    install_rate: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rows", 1, 10**11),
            ("users", 0, 10**8),
            ("ads", 0, 10**6),
            ("days", 1, 3_650),
            ("interests", 1, 8),
            ("agreement", -1, 1),
            ("drift", 0, 10),
            ("cold", 0, 0.9),
            ("signal", 0, 10),
            ("click_rate", 0.001, 0.9),
            ("install_rate", 0.001, 0.9),
            ("seed", 0, 2**32 - 1),
        ):
            value = getattr(self, name)
            kinds = int if isinstance(getattr(AdLog, name), int) else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
                raise DeclarationError(f"Ad log: `{name}` must be from {low:,} to {high:,}. Received: {value!r:.80}")
        object.__setattr__(self, "users", self.users or min(max(self.rows // 40, 100), 2_000_000))
        object.__setattr__(self, "ads", self.ads or min(max(self.rows // 1_000, 50), 20_000))


class Block(NamedTuple):
    """Some rows of one day.

    Attributes:
        day: The day.
        log: `ts` (seconds), `user_id`, `ad_id`, `hour`, `slot`, `click`, `install`, `revenue`.
        truth: Of the same rows the probability of a click (`click`), of an install after a click (`install`), and the
            mean revenue of an install (`revenue`), Float32.
    """

    day: datetime.date
    log: pl.DataFrame
    truth: pl.DataFrame


class World:
    """The users and ads of a log, and what happens when they meet.

    Args:
        settings: What the log is like.

    Attributes:
        ads: `ad_id`, `ad_title`, `advertiser`, `categories` (lists), `bid`.
    """

    def __init__(self, settings: AdLog) -> None:
        self.settings = settings
        random = np.random.default_rng([settings.seed, _WORLD])
        topics = len(TOPICS)
        favours = [_favours(random, shift) for shift in (0, 5)]
        agreement = settings.agreement
        favours[1] = agreement * favours[0] + np.sqrt(1 - agreement**2) * favours[1]
        self._slot_effect = np.array([0.5, 0.0, -0.2, -0.6])
        self._device_effect = np.array([0.3, 0.0, -0.3, -0.8])
        self._phase = random.uniform(0, 2 * np.pi, topics)
        self._make_ads(random, favours)
        self._make_users(np.random.default_rng([settings.seed, _USERS]))
        self._intercepts = np.zeros(2)
        self._calibrate()

    def _make_ads(self, random: np.random.Generator, favours: list[np.ndarray]) -> None:
        settings, count = self.settings, self.settings.ads
        advertisers = max(count // 8, 4)
        main = random.integers(0, len(TOPICS), count)
        second = (main + random.integers(1, len(TOPICS), count)) % len(TOPICS)
        has_second = random.random(count) < 0.4
        advertiser = random.integers(0, advertisers, count)
        self._main = main
        # How much each interest favours each ad, of clicks and of installs.
        self._favours = [
            np.where(has_second[:, None], 0.6 * favour[:, main].T + 0.4 * favour[:, second].T, favour[:, main].T)
            for favour in favours
        ]
        self._quality = [
            random.normal(0, 0.25, advertisers)[advertiser] + random.normal(0, 0.25, count) for _ in range(2)
        ]
        price = random.normal(0, 0.6, count)
        self._price = price
        self._ad_births = _births(random, count, settings)
        self._ad_shares = np.cumsum(random.lognormal(0, 1, count))
        number = np.arange(count)
        names = np.array([f"ad{ad:05d}" for ad in number])
        self._ad_ids = pl.Series(names)
        topics = np.array(TOPICS)
        self.ads = pl.DataFrame(
            {
                "ad_id": names,
                "ad_title": [f"{topics[m].title()} {ad}" for ad, m in zip(number, main, strict=True)],
                "advertiser": [f"advertiser{a:04d}" for a in advertiser],
                "categories": [
                    [topics[m], topics[s]] if two else [topics[m]]
                    for m, s, two in zip(main, second, has_second, strict=True)
                ],
                "bid": np.round(0.3 * np.exp(0.7 * price + random.normal(0, 0.3, count)), 3),
            },
            schema_overrides={"categories": pl.List(pl.String)},
        )

    def _make_users(self, random: np.random.Generator) -> None:
        settings, count, interests = self.settings, self.settings.users, self.settings.interests
        # Popular interests are drawn more often, none twice.
        popularity = np.log(1 / np.arange(2, len(TOPICS) + 2))
        self._interests = np.empty((count, interests), np.int8)
        for block in _blocks(count):
            keys = popularity + random.gumbel(size=(len(block), len(TOPICS)))
            self._interests[block] = np.argsort(-keys, axis=1)[:, :interests]
        weights = random.gamma(2.0, size=(count, interests)).astype(np.float32)
        self._weights = weights / weights.sum(axis=1, keepdims=True)
        self._bias = random.normal(0, 0.4, count).astype(np.float32)
        self._spending = random.normal(0, 0.3, count).astype(np.float32)
        self._age = random.integers(14, 80, count).astype(np.int8)
        self._device = random.choice(len(DEVICES), count, p=[0.6, 0.1, 0.25, 0.05]).astype(np.int8)
        self._user_births = _births(random, count, settings)
        self._user_shares = np.cumsum(random.lognormal(0, 1, count))
        # Ids look like what they are elsewhere: numbers without an order or a meaning.
        self._user_ids = _mixed(np.arange(count, dtype=np.uint64) + np.uint64(settings.seed * 1_000_003 + 1))

    def users(self) -> Iterator[pl.DataFrame]:
        """The users in blocks: `user_id`, `age`, `gender`, `city`, `device`, `interests`, `interests_weight`.

        An age that is not known is -1. What a log knows of interests is noisy: one in seven is missing, others are
        there by mistake.
        """
        settings = self.settings
        for number, block in enumerate(_blocks(settings.users)):
            random = np.random.default_rng([settings.seed, _USERS, number + 1])
            size, interests = len(block), settings.interests
            shown = random.random((size, interests)) > 0.15
            weights = self._weights[block] * random.uniform(0.7, 1.3, (size, interests))
            wrong = random.integers(0, len(TOPICS), (size, 1))
            shown_wrong = (random.random((size, 1)) < 0.3) & ~(self._interests[block] == wrong).any(
                axis=1, keepdims=True
            )
            topics = np.concatenate([self._interests[block], wrong], axis=1)
            weights = np.concatenate([weights, random.uniform(0.05, 0.2, (size, 1))], axis=1)
            shown = np.concatenate([shown, shown_wrong], axis=1)
            offsets = shown.sum(axis=1)
            flat = pl.DataFrame(
                {
                    "row": np.repeat(np.arange(size), offsets),
                    "interests": pl.Series(TOPICS).gather(topics[shown].astype(np.int64)),
                    "interests_weight": np.round(weights[shown], 2).astype(np.float32),
                }
            )
            lists = flat.group_by("row", maintain_order=True).agg("interests", "interests_weight")
            age = np.where(random.random(size) < 0.1, -1, self._age[block])
            city = random.choice(CITIES, size, p=_CITY_SHARES)
            gender = random.choice(4, size, p=[0.47, 0.45, 0.02, 0.06])
            yield (
                pl.DataFrame(
                    {
                        "row": np.arange(size),
                        "user_id": self._user_ids[block],
                        "age": age.astype(np.int64),
                        "gender": pl.Series([*GENDERS, None]).gather(gender),
                        "city": pl.Series([f"city{number:03d}" for number in range(CITIES)]).gather(city),
                        "device": pl.Series(DEVICES).gather(self._device[block].astype(np.int64)),
                    }
                )
                .join(lists, on="row", how="left", maintain_order="left")
                .with_columns(pl.col("interests", "interests_weight").fill_null([]))
                .drop("row")
            )

    def rows(self) -> Iterator[Block]:
        """The rows in the order of time, in blocks."""
        settings = self.settings
        ends = np.linspace(0, settings.rows, settings.days + 1).round().astype(np.int64)
        for day, rows in enumerate(np.diff(ends)):
            for number, block in enumerate(_blocks(int(rows))):
                random = np.random.default_rng([settings.seed, _ROWS, day, number])
                # Rows are evenly spread over the busy time of a day, ascending over all its blocks.
                busy = (np.arange(block.start, block.stop) + random.random(len(block))) / rows
                yield self._block(random, day, busy)

    def _block(self, random: np.random.Generator, day: int, busy: np.ndarray) -> Block:
        """Rows at these shares of the busy time of a day."""
        share = np.concatenate([[0], np.cumsum(_BY_HOUR) / _BY_HOUR.sum()])
        second = np.minimum(np.interp(busy, share, np.arange(25) * 3_600).astype(np.int64), _DAY - 1)
        user, ad = self._meet(random, np.full(len(second), day))
        hour, slot = second // 3_600, random.choice(len(SLOTS), len(second), p=[0.2, 0.5, 0.2, 0.1])
        logits = self._logits(user, ad, day + second / _DAY, hour, slot)
        click, install = (_sigmoid(logit + self._intercepts[task]) for task, logit in enumerate(logits[:2]))
        log_revenue = logits[2]
        clicked = random.random(len(second)) < click
        installed = clicked & (random.random(len(second)) < install)
        revenue = np.exp(log_revenue + _NOISE_OF_REVENUE * random.standard_normal(len(second)))
        first = int((FIRST_DAY - datetime.date(1970, 1, 1)).days + day) * _DAY
        log = pl.DataFrame(
            {
                "ts": first + second,
                "user_id": self._user_ids[user],
                "ad_id": self._ad_ids.gather(ad),
                "hour": hour.astype(np.int8),
                "slot": pl.Series(SLOTS).gather(slot),
                "click": clicked.astype(np.int8),
                "install": installed.astype(np.int8),
                "revenue": np.where(installed, np.round(revenue, 2), 0).astype(np.float32),
            }
        )
        truth = {"click": click, "install": install, "revenue": np.exp(log_revenue + _NOISE_OF_REVENUE**2 / 2)}
        return Block(
            FIRST_DAY + datetime.timedelta(days=day),
            log,
            pl.DataFrame({name: column.astype(np.float32) for name, column in truth.items()}),
        )

    def _meet(self, random: np.random.Generator, day: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A user and an ad for each row, of those that have turned up by its day."""
        user, ad = (
            np.searchsorted(shares, random.random(len(day)) * shares[np.searchsorted(births, day, side="right") - 1])
            for shares, births in ((self._user_shares, self._user_births), (self._ad_shares, self._ad_births))
        )
        return user, ad

    def _logits(
        self, user: np.ndarray, ad: np.ndarray, day: np.ndarray, hour: np.ndarray, slot: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log-odds of a click and of an install after it, less their intercepts; mean log revenue: `(n,)` each."""
        interests = self._interests[user].astype(np.int64)
        weights = self._weights[user]
        of_click, of_install = (
            np.log((weights * np.exp(_SHARPNESS * favours[ad[:, None], interests])).sum(axis=1)) / _SHARPNESS
            for favours in self._favours
        )
        drift = self.settings.drift * np.sin(2 * np.pi * day / 28 + self._phase[self._main[ad]])
        click = 0.8 * of_click + self._quality[0][ad] + self._bias[user] + self._slot_effect[slot] + drift
        click += 0.2 * np.cos((hour - 20) / 24 * 2 * np.pi)
        install = 0.8 * of_install + self._quality[1][ad] + self._device_effect[self._device[user]]
        revenue = 1.5 + self._price[ad] + 0.3 * of_install + self._spending[user] + 0.01 * (self._age[user] - 45.0)
        return self.settings.signal * click, self.settings.signal * install, revenue

    def _calibrate(self) -> None:
        """Sets the intercepts so that mean probabilities are those of the settings."""
        random = np.random.default_rng([self.settings.seed, _CALIBRATION])
        day = random.integers(0, self.settings.days, 2**15)
        user, ad = self._meet(random, day)
        hour = random.choice(24, len(day), p=_BY_HOUR / _BY_HOUR.sum())
        slot = random.choice(len(SLOTS), len(day), p=[0.2, 0.5, 0.2, 0.1])
        click, install, _ = self._logits(user, ad, day + (hour + 0.5) / 24, hour, slot)
        self._intercepts[0] = _intercept(click, self.settings.click_rate)
        weights = _sigmoid(click + self._intercepts[0])
        self._intercepts[1] = _intercept(install, self.settings.install_rate, weights)


def write_tables(settings: AdLog, folder: Path) -> Path:
    """Writes a log: `log/<day>.parquet`, `users.parquet`, `ads.parquet` and `settings.json`.

    The true probabilities of the same rows are in `truth/<day>.parquet`.

    Args:
        settings: What the log is like.
        folder: The folder; it appears when all files are complete.

    Returns:
        The folder.
    """
    with atomic_write(folder) as temporary:
        world = World(settings)
        for name in ("log", "truth"):
            (temporary / name).mkdir(parents=True)
        world.ads.write_parquet(temporary / "ads.parquet")
        with _Writer(temporary / "users.parquet") as writer:
            for users in world.users():
                writer.write(users)
        with contextlib.ExitStack() as open_files:
            day: datetime.date | None = None
            writers: tuple[_Writer, ...] = ()
            for block in world.rows():
                if block.day != day:
                    open_files.close()
                    day = block.day
                    names = [temporary / name / f"{day}.parquet" for name in ("log", "truth")]
                    writers = tuple(open_files.enter_context(_Writer(name)) for name in names)
                for writer, frame in zip(writers, (block.log, block.truth), strict=True):
                    writer.write(frame)
        values = {"format": FORMAT, **dataclasses.asdict(settings)}
        (temporary / "settings.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder


def read_truth(folder: Path) -> pl.DataFrame:
    """The log in `folder` and the truth beside it: columns of the log, and `p_click`, `p_install`, `mean_revenue`."""
    log, truth = (pl.read_parquet(folder / name / "*.parquet") for name in ("log", "truth"))
    return log.hstack(truth.select(p_click="click", p_install="install", mean_revenue="revenue"))


def small_csv(path: str | Path, rows: int = 5_000, seed: int = 0) -> Path:
    """Writes a small log as one CSV with everything in it, as a beginner may have it.

    Lists are `a|b`, weighted ones `a:0.3|b:0.5`; a cell of something unknown is empty. The same arguments make the same
    bytes.

    Args:
        path: The file.
        rows: Number of impressions.
        seed: Seed of everything.

    Returns:
        The file.
    """
    settings = AdLog(
        rows=rows, users=max(rows // 20, 20), ads=60, signal=1.5, click_rate=0.25, install_rate=0.4, seed=seed
    )
    world = World(settings)
    log = pl.concat([block.log for block in world.rows()])
    users = pl.concat(list(world.users()))
    weighted = pl.struct("interests", "interests_weight").map_elements(_weighted_cell, return_dtype=pl.String)
    table = (
        log.join(users, on="user_id", how="left", maintain_order="left")
        .join(world.ads, on="ad_id", how="left", maintain_order="left")
        .select(
            time=pl.from_epoch("ts", "s").dt.strftime("%Y-%m-%dT%H:%M:%SZ"),
            user_id=pl.format("u{}", (pl.col("user_id") % 10**12).cast(pl.String).str.zfill(12)),
            age=pl.when(pl.col("age") >= 0).then("age"),
            gender="gender",
            city="city",
            device="device",
            interests=weighted,
            hour="hour",
            slot="slot",
            ad_id="ad_id",
            ad_title="ad_title",
            advertiser="advertiser",
            categories=pl.col("categories").list.join("|"),
            bid="bid",
            click="click",
            install="install",
            revenue="revenue",
        )
    )
    path = Path(path)
    with atomic_write(path) as temporary:
        table.write_csv(temporary, float_precision=2)
    return path


def _weighted_cell(lists: dict[str, Any]) -> str:
    return "|".join(
        f"{value}:{weight:.2f}" for value, weight in zip(lists["interests"], lists["interests_weight"], strict=True)
    )


class _Writer:
    """A Parquet file that grows block by block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def write(self, frame: pl.DataFrame) -> None:
        table = frame.to_arrow()
        if self._file is None:
            texts = [name for name, kind in frame.schema.items() if kind == pl.String]
            self._file = pq.ParquetWriter(self._path, table.schema, compression="zstd", use_dictionary=texts)
        self._file.write_table(table)


def _blocks(count: int) -> Iterator[range]:
    for start in range(0, count, _BLOCK):
        yield range(start, min(start + _BLOCK, count))


def _favours(random: np.random.Generator, shift: int) -> np.ndarray:
    """How much each interest favours each category, `(topics, topics)`, of mean 0 and variance 1.

    One category stands out for each interest, that of the same name or one `shift` further.
    """
    topics = len(TOPICS)
    favours = 2.0 * np.roll(np.eye(topics), shift, axis=1) + random.normal(0, 0.5, (topics, topics))
    return (favours - favours.mean()) / favours.std()


def _births(random: np.random.Generator, count: int, settings: AdLog) -> np.ndarray:
    """The day on which each user or ad turns up, ascending."""
    late = random.random(count) < settings.cold
    late[0] = False
    days = np.where(late, random.uniform(0, settings.days, count), 0)
    return np.sort(np.minimum(np.floor(days), settings.days - 1)).astype(np.int64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Distinct positive int64 of distinct numbers, without an order (SplitMix64, less its last bit)."""
    with np.errstate(over="ignore"):
        state = numbers * np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def _intercept(logits: np.ndarray, rate: float, weights: np.ndarray | None = None) -> float:
    """What is added to log-odds so that the mean probability is `rate`."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        mean = np.average(_sigmoid(logits + middle), weights=weights)
        low, high = (low, middle) if mean > rate else (middle, high)
    return (low + high) / 2


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))
