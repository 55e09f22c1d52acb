//! Numbers and runs of slots: what is free, and what will be after a grace period.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use proxy_common::tables::Range;

/// Single numbers, the lowest free one first. Each remembers how often it was given out.
pub struct Numbers {
    /// Never given out from here on.
    next: u32,
    end: u32,
    free: BTreeSet<u32>,
    retired: VecDeque<(Instant, u32)>,
    generations: BTreeMap<u32, u16>,
}

impl Numbers {
    /// The numbers from `first` up to, not including, `end`.
    pub fn new(first: u32, end: u32) -> Self {
        let (free, retired) = (BTreeSet::new(), VecDeque::new());
        Self { next: first, end, free, retired, generations: BTreeMap::new() }
    }

    /// How many can be taken now.
    pub fn free(&self) -> usize {
        self.free.len() + (self.end - self.next) as usize
    }

    /// A number that is not in use.
    pub fn take(&mut self) -> Option<u32> {
        if let Some(number) = self.free.pop_first() {
            return Some(number);
        }
        let number = self.next;
        (number < self.end).then(|| self.next += 1)?;
        Some(number)
    }

    /// A number that is not in use, and how often it was given out before.
    pub fn take_with_generation(&mut self) -> Option<(u32, u16)> {
        let number = self.take()?;
        let generation = self.generations.entry(number).or_default();
        *generation = generation.wrapping_add(1);
        Some((number, *generation))
    }

    /// Notes that a number is in use, with its generation. False if it is out of bounds or already in
    /// use: numbers are asserted unique.
    pub fn adopt(&mut self, number: u32, generation: u16) -> bool {
        if number >= self.end {
            return false;
        }
        while self.next <= number {
            self.free.insert(self.next);
            self.next += 1;
        }
        self.generations.insert(number, generation);
        self.free.remove(&number)
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
            self.free.insert(number);
        }
    }
}

/// Runs of slots, first fit.
pub struct Runs {
    /// First slot → how many, never touching each other.
    free: BTreeMap<u32, u32>,
    retired: VecDeque<(Instant, Range)>,
}

impl Runs {
    /// Slots from 0 up to, not including, `end`.
    pub fn new(end: u32) -> Self {
        Self { free: BTreeMap::from([(0, end)]), retired: VecDeque::new() }
    }

    /// A run of `count` slots.
    pub fn take(&mut self, count: u32) -> Option<Range> {
        if count == 0 {
            return Some(Range::default());
        }
        let (first, size) =
            self.free.iter().map(|(f, s)| (*f, *s)).find(|(_, size)| *size >= count)?;
        self.free.remove(&first);
        if size > count {
            self.free.insert(first + count, size - count);
        }
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
        self.free.remove(&first);
        if first < range.first {
            self.free.insert(first, range.first - first);
        }
        if range_end < end {
            self.free.insert(range_end, end - range_end);
        }
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
            self.join(range);
        }
    }

    fn join(&mut self, range: Range) {
        let Range { mut first, mut count } = range;
        if let Some(size) = self.free.remove(&(first + count)) {
            count += size;
        }
        let before = self.free.range(..first).next_back().map(|(f, s)| (*f, *s));
        if let Some((start, size)) = before.filter(|(start, size)| start + size == first) {
            first = start;
            count += size;
        }
        self.free.insert(first, count);
    }
}
