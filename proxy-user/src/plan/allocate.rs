//! Numbers and runs of slots: what is free, and what will be after a grace period.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use proxy_common::tables::Range;

/// Among how many free numbers the next one has its turn, as long as there are others that were never given out.
const KEPT_FREE: usize = 4096;

/// Single numbers. Each remembers how often it was given out; the one that has been free for longest is next, and
/// that only when many are free: it takes long until a number means another thing, and longer until it has
/// the same generation again.
pub struct Numbers {
    /// Never given out from here on.
    next: u32,
    end: u32,
    free: VecDeque<u32>,
    retired: VecDeque<(Instant, u32)>,
    /// Numbers that were passed over when others were taken over.
    skipped: BTreeSet<u32>,
    generations: BTreeMap<u32, u16>,
}

impl Numbers {
    /// The numbers from `first` up to, not including, `end`.
    pub fn new(first: u32, end: u32) -> Self {
        let (free, retired, skipped) = (VecDeque::new(), VecDeque::new(), BTreeSet::new());
        Self { next: first, end, free, retired, skipped, generations: BTreeMap::new() }
    }

    /// How many can be taken now.
    pub fn free(&self) -> usize {
        self.free.len() + self.skipped.len() + (self.end - self.next) as usize
    }

    /// How many are in use, or will be free only after a while.
    pub fn used(&self) -> usize {
        (self.end as usize).saturating_sub(self.free())
    }

    /// A number that is not in use.
    pub fn take(&mut self) -> Option<u32> {
        if self.free.len() + self.skipped.len() < KEPT_FREE && self.next < self.end {
            self.next += 1;
            return Some(self.next - 1);
        }
        self.skipped.pop_first().or_else(|| self.free.pop_front())
    }

    /// A number that is not in use, and how often it was given out before.
    pub fn take_with_generation(&mut self) -> Option<(u32, u16)> {
        let number = self.take()?;
        let generation = self.generations.entry(number).or_default();
        // 0 says that nothing was ever written there.
        *generation = generation.checked_add(1).unwrap_or(1);
        Some((number, *generation))
    }

    /// Notes that a number is in use, with its generation. False if it is out of bounds or already in
    /// use: numbers are asserted unique.
    pub fn adopt(&mut self, number: u32, generation: u16) -> bool {
        if number >= self.end {
            return false;
        }
        while self.next <= number {
            self.skipped.insert(self.next);
            self.next += 1;
        }
        self.generations.insert(number, generation);
        self.skipped.remove(&number)
    }

    /// Notes the generation of a number that is not in use.
    pub fn remember(&mut self, number: u32, generation: u16) {
        self.generations.insert(number, generation);
    }

    /// Frees a number at `when`.
    pub fn retire(&mut self, when: Instant, number: u32) {
        self.retired.push_back((when, number));
    }

    /// Gives back what is free by now.
    pub fn reclaim(&mut self, now: Instant) {
        while let Some((_, number)) = self.retired.pop_front_if(|(when, _)| *when <= now) {
            self.free.push_back(number);
        }
    }
}

/// Runs of slots, the smallest that is long enough first.
pub struct Runs {
    /// First slot → how many, never touching each other.
    free: BTreeMap<u32, u32>,
    /// The same by length.
    by_length: BTreeSet<(u32, u32)>,
    /// How many slots are free.
    total: u32,
    retired: VecDeque<(Instant, Range)>,
}

impl Runs {
    /// Slots from 0 up to, not including, `end`.
    pub fn new(end: u32) -> Self {
        let mut runs = Self {
            free: BTreeMap::new(),
            by_length: BTreeSet::new(),
            total: 0,
            retired: VecDeque::new(),
        };
        runs.put(0, end);
        runs
    }

    /// How many slots are free.
    pub const fn free(&self) -> u32 {
        self.total
    }

    fn put(&mut self, first: u32, count: u32) {
        if count > 0 {
            self.free.insert(first, count);
            self.by_length.insert((count, first));
            self.total += count;
        }
    }

    fn cut(&mut self, first: u32) -> Option<u32> {
        let count = self.free.remove(&first)?;
        self.by_length.remove(&(count, first));
        self.total -= count;
        Some(count)
    }

    /// A run of `count` slots.
    pub fn take(&mut self, count: u32) -> Option<Range> {
        if count == 0 {
            return Some(Range::default());
        }
        let (size, first) = *self.by_length.range((count, 0)..).next()?;
        self.cut(first);
        self.put(first + count, size - count);
        Some(Range { first, count })
    }

    /// Notes that a run is in use. False if part of it is already, or out of bounds.
    pub fn adopt(&mut self, range: Range) -> bool {
        if range.count == 0 {
            return true;
        }
        let Some((first, size)) = self.free.range(..=range.first).next_back() else { return false };
        let (first, end) = (*first, first + size);
        let Some(range_end) = range.first.checked_add(range.count) else { return false };
        if range_end > end {
            return false;
        }
        self.cut(first);
        self.put(first, range.first - first);
        self.put(range_end, end - range_end);
        true
    }

    /// Frees a run at `when`.
    pub fn retire(&mut self, when: Instant, range: Range) {
        if range.count > 0 {
            self.retired.push_back((when, range));
        }
    }

    /// Gives back what is free by now, joined with its neighbours.
    pub fn reclaim(&mut self, now: Instant) {
        while let Some((_, range)) = self.retired.pop_front_if(|(when, _)| *when <= now) {
            self.give_back(range);
        }
    }

    /// Frees a run at once, joined with its neighbours.
    pub fn give_back(&mut self, range: Range) {
        let Range { mut first, mut count } = range;
        if count == 0 {
            return;
        }
        if let Some(size) = self.cut(first + count) {
            count += size;
        }
        let before = self.free.range(..first).next_back().map(|(f, s)| (*f, *s));
        if let Some((start, size)) = before.filter(|(start, size)| start + size == first) {
            self.cut(start);
            first = start;
            count += size;
        }
        self.put(first, count);
    }
}
