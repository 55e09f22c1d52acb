//! Links that could not be attached to, or not yet, each tried again after a while, and after twice that if it fails again.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::links::Role;

/// How long until the first new try.
const FIRST: Duration = Duration::from_millis(100);
/// How long at most.
const LONGEST: Duration = Duration::from_secs(30);

/// What is to be tried again.
#[derive(Default)]
pub struct Retries {
    /// By index.
    links: HashMap<u32, Retry>,
}

struct Retry {
    role: Role,
    tries: u32,
    wait: Duration,
    when: Instant,
}

impl Retries {
    /// Notes that a link could not be attached to. Says how often that was by now.
    pub fn insert(&mut self, ifindex: u32, role: Role, now: Instant) -> u32 {
        let before = self.links.get(&ifindex).filter(|before| before.role == role);
        let (tries, wait) =
            before.map_or((1, FIRST), |before| (before.tries + 1, (before.wait * 2).min(LONGEST)));
        self.links.insert(ifindex, Retry { role, tries, wait, when: now + wait });
        tries
    }

    /// Notes that a link is not to be attached to before then.
    pub fn postpone(&mut self, ifindex: u32, role: Role, when: Instant) {
        self.links.insert(ifindex, Retry { role, tries: 0, wait: FIRST, when });
    }

    /// Notes that a link was attached to, or is gone.
    pub fn remove(&mut self, ifindex: u32) {
        self.links.remove(&ifindex);
    }

    /// Forgets all other links.
    pub fn keep_only(&mut self, links: &HashSet<u32>) {
        self.links.retain(|ifindex, _| links.contains(ifindex));
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.links.is_empty()
    }

    /// When the next is due.
    pub fn next(&self) -> Option<Instant> {
        self.links.values().map(|retry| retry.when).min()
    }

    /// The one that has been due for longest.
    pub fn due(&self, now: Instant) -> Option<(u32, Role)> {
        let due = self.links.iter().filter(|(_, retry)| retry.when <= now);
        let first = due.min_by_key(|(_, retry)| retry.when);
        first.map(|(ifindex, retry)| (*ifindex, retry.role))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_try_waits_twice_as_long_as_the_one_before_up_to_half_a_minute() {
        let (mut retries, mut now) = (Retries::default(), Instant::now());
        let mut waits = Vec::new();
        for tries in 1..=12 {
            assert_eq!(retries.insert(7, Role::Pod, now), tries);
            assert!(retries.due(now).is_none());
            let next = retries.next().unwrap();
            waits.push((next - now).as_millis());
            now = next;
            assert_eq!(retries.due(now), Some((7, Role::Pod)));
        }
        assert_eq!(waits[..4], [100, 200, 400, 800]);
        assert_eq!(waits[10..], [30_000, 30_000]);
        // Another role is another matter.
        assert_eq!(retries.insert(7, Role::Uplink, now), 1);
        retries.keep_only(&[7].into());
        assert_eq!(retries.insert(7, Role::Uplink, now), 2);
        retries.keep_only(&HashSet::new());
        assert!(retries.is_empty() && retries.next().is_none());
    }
}
