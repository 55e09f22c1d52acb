//! The room for slots: tables that Service ports share, members of their own, and how long tables may be.

use std::collections::{HashMap, HashSet};
use std::time::Instant;

use proxy_common::tables::{Algorithm, Choice, Range};

use super::allocate::Runs;
use super::op::{BackendEntry, Op};
use super::spread::{MOST, SHARES, Weighted, length, spread};
use super::{GRACE, digest};

/// A table by what it holds, and how long it is.
type TableId = (u32, u64);

/// Which of [`SHARES`] may be made.
type Levels = std::ops::Range<usize>;

/// The level of a part that should have a table and has none.
const NO_ROOM: usize = SHARES.len();

/// Where a table is, and how many parts use it.
#[derive(Clone, Copy, Debug)]
struct Place {
    first: u32,
    users: usize,
}

/// The backends to choose from.
#[derive(Default)]
pub struct Candidates {
    /// Their addresses and weights; none if they are so many, and of the same weight, that each has the same share
    /// whatever the algorithm.
    backends: Vec<Weighted>,
    /// Their numbers.
    numbers: Vec<u32>,
}

impl Candidates {
    /// Those of a Service port's backends that are usable.
    pub fn of(backends: &[(u32, BackendEntry)], is_usable: impl Fn(&BackendEntry) -> bool) -> Self {
        let usable = || backends.iter().filter(|(_, entry)| is_usable(entry));
        let mut numbers = Vec::with_capacity(backends.len());
        let mut weights = None::<u16>;
        let mut equal = true;
        for (number, entry) in usable() {
            numbers.push(*number);
            equal &= *weights.get_or_insert(entry.weight) == entry.weight;
        }
        if equal && numbers.len() > MOST {
            return Self { backends: Vec::new(), numbers };
        }
        let backends = usable().map(|(_, entry)| (entry.address, entry.weight)).collect();
        Self { backends, numbers }
    }

    /// What tells them from others, with the algorithm that chooses among them.
    fn mark(&self, algorithm: Algorithm) -> u64 {
        digest(&(algorithm, &self.backends, &self.numbers))
    }
}

/// What a Service port has in the slots for the backends of the cluster, or for those of this node.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Where it is.
    pub choice: Choice,
    table: Option<TableId>,
    /// The backends' numbers, by position.
    members: Box<[u32]>,
    /// What was to be there: a hash of the algorithm and the candidates. 0 if it is not what is there.
    wanted: u64,
    /// Which of [`SHARES`] the table was made for; [`NO_ROOM`] if there was none for any.
    level: usize,
    /// How much room it would take at each of [`SHARES`].
    demand: [u32; SHARES.len()],
}

impl Part {
    /// The runs that it takes up.
    fn runs(&self) -> [Range; 2] {
        let Choice { table, count, members } = self.choice;
        let table =
            if table == Range::NO_TABLE { Range::default() } else { Range { first: table, count } };
        let count = u32::try_from(self.members.len()).unwrap_or(u32::MAX);
        [table, Range { first: members, count }]
    }
}

/// The room for slots.
pub struct Slots {
    runs: Runs,
    capacity: u32,
    /// One place each, but for what was taken over in the middle of a change.
    tables: HashMap<TableId, Vec<Place>>,
    /// How much room all parts would take at each of [`SHARES`].
    demand: [u64; SHARES.len()],
    /// Which of [`SHARES`] new tables are made for.
    level: usize,
}

impl Slots {
    /// Room for so many slots, all free.
    pub fn new(capacity: u32) -> Self {
        let (tables, demand) = (HashMap::new(), [0; SHARES.len()]);
        Self { runs: Runs::new(capacity), capacity, tables, demand, level: 0 }
    }

    /// How many slots are in use or will be free only after a while.
    pub fn used(&self) -> u32 {
        self.capacity - self.runs.free()
    }

    /// How many slots there are.
    pub const fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Gives back what has been out of use for long enough.
    pub fn reclaim(&mut self, now: Instant) {
        self.runs.reclaim(now);
    }

    /// Whether a part's table is of another length than tables are made with now.
    pub fn is_of_other_level(&self, part: &Part) -> bool {
        part.choice.count > 0 && (part.level != self.level || part.wanted == 0)
    }

    /// Decides anew how long tables may be. True if that has changed.
    pub fn choose_level(&mut self) -> bool {
        let room = u64::from(self.capacity);
        // An eighth is kept for changes; and before tables grow there must be a quarter.
        let fits = |level: &usize| {
            let limit = if *level < self.level { room / 4 * 3 } else { room / 8 * 7 };
            self.demand[*level] <= limit
        };
        let level = (0..SHARES.len()).find(fits).unwrap_or(SHARES.len() - 1);
        std::mem::replace(&mut self.level, level) != level
    }

    /// Counts what a part is to hold from now on.
    pub fn note(&mut self, part: &mut Part, algorithm: Algorithm, candidates: &Candidates) {
        let demand = SHARES.map(|share| {
            let table = length(algorithm, &candidates.backends, share);
            u32::try_from(table + candidates.numbers.len()).unwrap_or(u32::MAX)
        });
        self.count(part.demand, demand);
        part.demand = demand;
    }

    fn count(&mut self, before: [u32; SHARES.len()], after: [u32; SHARES.len()]) {
        for (level, sum) in self.demand.iter_mut().enumerate() {
            *sum = *sum - u64::from(before[level]) + u64::from(after[level]);
        }
    }

    /// Makes a part hold these candidates: in fresh runs, to which nothing leads yet. False if there is no
    /// room: then whoever is gone is replaced by others, and that is all.
    pub fn fill(
        &mut self,
        now: Instant,
        part: &mut Part,
        algorithm: Algorithm,
        candidates: &Candidates,
        ops: &mut Vec<Op>,
    ) -> bool {
        let wanted = candidates.mark(algorithm);
        if part.wanted == wanted && part.level == self.level {
            return true;
        }
        if part.wanted == 0 && self.recognise(part, algorithm, candidates) {
            part.wanted = wanted;
            return true;
        }
        let Some((members, is_fresh)) = self.members(part, candidates, ops) else {
            replace_gone(part, candidates, ops);
            return false;
        };
        // A longer table for the same backends is worth nothing before it is as long as tables are now.
        let levels = self.level..if part.wanted == wanted && part.level > self.level {
            self.level + 1
        } else {
            SHARES.len()
        };
        let is_optional = levels.len() == 1 && levels.end != SHARES.len();
        let Some((choice, table, level)) =
            self.choice(algorithm, candidates, members, (levels, is_optional), ops)
        else {
            return true;
        };
        self.release(now, part, is_fresh);
        part.choice = choice;
        part.table = table;
        if is_fresh {
            part.members = candidates.numbers.clone().into();
        }
        part.wanted = wanted;
        part.level = level;
        true
    }

    /// Whether a part that was taken over holds these candidates already, with a table of any length.
    fn recognise(&self, part: &mut Part, algorithm: Algorithm, candidates: &Candidates) -> bool {
        if *part.members != *candidates.numbers {
            return false;
        }
        let levels = (self.level..SHARES.len()).chain(0..self.level);
        let is_this = |level: &usize| {
            let positions = spread(algorithm, &candidates.backends, SHARES[*level]);
            positions.map(|positions| table_id(&positions)) == part.table
        };
        let found = levels.into_iter().find(is_this);
        part.level = found.unwrap_or(part.level);
        found.is_some()
    }

    /// Where the candidates' numbers are: where they were, if they are the same, or in a fresh run. `None` if
    /// there is no room.
    fn members(
        &mut self,
        part: &Part,
        candidates: &Candidates,
        ops: &mut Vec<Op>,
    ) -> Option<(u32, bool)> {
        let numbers = &candidates.numbers;
        if *part.members == **numbers {
            return Some((part.choice.members, false));
        }
        let first = self.runs.take(u32::try_from(numbers.len()).ok()?)?.first;
        if !numbers.is_empty() {
            ops.push(Op::Slots { first, numbers: numbers.clone() });
        }
        Some((first, true))
    }

    /// A choice among candidates whose numbers are there: by the longest table of these levels that the room
    /// allows, which level that is; without a table, where each has the same share, if there is room for none.
    /// `None` if that is not wanted.
    fn choice(
        &mut self,
        algorithm: Algorithm,
        candidates: &Candidates,
        members: u32,
        (mut levels, is_optional): (Levels, bool),
        ops: &mut Vec<Op>,
    ) -> Option<(Choice, Option<TableId>, usize)> {
        let Candidates { backends, numbers } = candidates;
        if numbers.is_empty() {
            return Some((Choice::default(), None, self.level));
        }
        let found = levels.find_map(|level| {
            let table = self.table(spread(algorithm, backends, SHARES[level]), ops)?;
            Some((table, level))
        });
        if found.is_none() && is_optional {
            return None;
        }
        let level = found.map_or(NO_ROOM, |(_, level)| level);
        if let Some((Some((id, first)), _)) = found {
            return Some((Choice { table: first, count: id.0, members }, Some(id), level));
        }
        let count = u32::try_from(numbers.len()).expect("they have numbers of 32 bits");
        Some((Choice { table: Range::NO_TABLE, count, members }, None, level))
    }

    /// A table with these positions: one that there is, or a new one. The outer `None` if there is no room;
    /// the inner one if none is needed.
    #[expect(clippy::option_option, reason = "no room and no need are two things")]
    fn table(
        &mut self,
        positions: Option<Vec<u32>>,
        ops: &mut Vec<Op>,
    ) -> Option<Option<(TableId, u32)>> {
        let Some(positions) = positions else { return Some(None) };
        let id = table_id(&positions);
        if let Some(place) = self.tables.get_mut(&id).and_then(|places| places.first_mut()) {
            place.users += 1;
            return Some(Some((id, place.first)));
        }
        let first = self.runs.take(id.0)?.first;
        self.tables.insert(id, vec![Place { first, users: 1 }]);
        ops.push(Op::Slots { first, numbers: positions });
        Some(Some((id, first)))
    }

    /// Gives back what a part takes up, its members if so, once no packet can be led there any more.
    fn release(&mut self, now: Instant, part: &Part, with_members: bool) {
        let [table, members] = part.runs();
        if with_members {
            self.runs.retire(now + GRACE, members);
        }
        if let Some(id) = part.table
            && self.leave_table(id, table.first)
        {
            self.runs.retire(now + GRACE, table);
        }
    }

    /// One user less of a table. True if that was the last.
    fn leave_table(&mut self, id: TableId, first: u32) -> bool {
        let places = self.tables.get_mut(&id).expect("a table in use is known");
        let is_it = |place: &&mut Place| place.first == first;
        let place = places.iter_mut().find(is_it).expect("a place in use is known");
        place.users -= 1;
        if place.users > 0 {
            return false;
        }
        places.retain(|place| place.users > 0);
        if places.is_empty() {
            self.tables.remove(&id);
        }
        true
    }

    /// Gives back all of a part.
    pub fn remove(&mut self, now: Instant, part: &Part) {
        self.count(part.demand, [0; SHARES.len()]);
        self.release(now, part, true);
    }

    /// Takes over what a frontend leads to. `slots` are what the maps hold; `has_members` says whether another
    /// part has the same members and was taken over. `None` if it contradicts what was taken over before.
    pub fn adopt(&mut self, choice: Choice, slots: &[u32], has_members: bool) -> Option<Part> {
        let mut part = Part { choice, ..Part::default() };
        let read = |first: u32, count: u32| {
            let first = first as usize;
            slots.get(first..first.checked_add(count as usize)?)
        };
        let mut count = choice.count;
        if choice.table != Range::NO_TABLE {
            let positions = read(choice.table, choice.count)?;
            count = positions.iter().max()?.checked_add(1)?;
            part.table = Some(table_id(positions));
        }
        let members = Range { first: choice.members, count };
        let numbers = read(members.first, members.count)?;
        if let Some(id) = part.table {
            self.adopt_table(id, choice.table)?;
        }
        if has_members {
            return Some(part);
        }
        if self.runs.adopt(members) {
            part.members = numbers.into();
            return Some(part);
        }
        if let Some(id) = part.table
            && self.leave_table(id, choice.table)
        {
            self.runs.give_back(Range { first: choice.table, count: id.0 });
        }
        None
    }

    /// Notes that a table is in use at a place.
    fn adopt_table(&mut self, id: TableId, first: u32) -> Option<()> {
        let places = self.tables.entry(id).or_default();
        if let Some(place) = places.iter_mut().find(|place| place.first == first) {
            place.users += 1;
            return Some(());
        }
        if self.runs.adopt(Range { first, count: id.0 }) {
            places.push(Place { first, users: 1 });
            return Some(());
        }
        if places.is_empty() {
            self.tables.remove(&id);
        }
        None
    }
}

fn table_id(positions: &[u32]) -> TableId {
    (u32::try_from(positions.len()).expect("a table is short"), digest(&positions))
}

/// Puts others in the places of members that are no candidates any more. A packet that is on its way
/// finds the one or the other.
fn replace_gone(part: &mut Part, candidates: &Candidates, ops: &mut Vec<Op>) {
    part.wanted = 0;
    let numbers: HashSet<u32> = candidates.numbers.iter().copied().collect();
    let mut others = candidates.numbers.iter().copied().cycle();
    for (position, member) in (part.choice.members..).zip(&mut part.members) {
        if !numbers.contains(member) {
            *member = others.next().expect("without candidates there is room");
            ops.push(Op::Slots { first: position, numbers: vec![*member] });
        }
    }
}
