//! Where our programs stand among those of others at a link's egress (tcx).
//!
//! At ingress ours are the first. Others there see what a pod sends to a backend, so they are to see what comes from a backend too:
//! at egress ours are behind them, as long as each of them lets packets pass. One that may end the chain would hide ours.

use std::collections::HashMap;
use std::io;

use super::sys::{self, Order};
use super::verdicts::lets_pass;

/// The programs at a hook, in their order.
pub struct Chain {
    others: Vec<u32>,
    /// How many others stand before ours, if it is there.
    before: Option<usize>,
}

impl Chain {
    /// Reads it; `ours` are the numbers that our programs have.
    ///
    /// # Errors
    /// If the kernel refuses, most often because the link has gone.
    pub fn read(ifindex: u32, ours: &[u32]) -> io::Result<Self> {
        let all = sys::chain(ifindex, sys::TCX_EGRESS)?;
        let before = all.iter().position(|program| ours.contains(program));
        let others = all.into_iter().filter(|program| !ours.contains(program)).collect();
        Ok(Self { others, before })
    }

    /// Whether ours is there.
    pub const fn has_ours(&self) -> bool {
        self.before.is_some()
    }

    fn sorted(&self) -> Vec<u32> {
        let mut others = self.others.clone();
        others.sort_unstable();
        others
    }

    fn is(&self, order: Order) -> bool {
        let place = match order {
            Order::First => 0,
            Order::Last => self.others.len(),
        };
        self.before == Some(place)
    }
}

/// What is known of others' programs.
#[derive(Default)]
pub struct Neighbours {
    /// Whether each lets packets pass, by its number.
    passing: HashMap<u32, bool>,
    /// Beside which others ours was put in order, by link.
    settled: HashMap<u32, Vec<u32>>,
}

impl Neighbours {
    /// In which orders ours is to be attached, one after the other, so that it stands where it should. `now` is how it is attached, if
    /// it is. Beside the same others that is done once: who wants the same place is not fought.
    pub fn steps(&mut self, ifindex: u32, chain: &Chain, now: Option<Order>) -> Vec<Order> {
        let wanted = if chain.others.is_empty() {
            // Alone it is both.
            self.settled.remove(&ifindex);
            return vec![now.unwrap_or(Order::First)];
        } else if chain.others.iter().all(|program| self.lets_pass(*program)) {
            Order::Last
        } else {
            Order::First
        };
        let is_settled = self.settled.get(&ifindex) == Some(&chain.sorted());
        if now != Some(wanted) || chain.is(wanted) || is_settled {
            return vec![wanted];
        }
        // By way of the other end, so that ours is there all the time.
        match wanted {
            Order::First => vec![Order::Last, Order::First],
            Order::Last => vec![Order::First, Order::Last],
        }
    }

    /// Notes that ours was put in order beside those.
    pub fn settle(&mut self, ifindex: u32, chain: &Chain) {
        if !chain.others.is_empty() {
            self.settled.insert(ifindex, chain.sorted());
        }
    }

    /// Forgets a link.
    pub fn forget(&mut self, ifindex: u32) {
        self.settled.remove(&ifindex);
    }

    fn lets_pass(&mut self, program: u32) -> bool {
        let look = || {
            let instructions = sys::program(program).and_then(sys::instructions);
            let passes = instructions.is_ok_and(|instructions| lets_pass(&instructions));
            if !passes {
                tracing::info!(
                    "program {program} of someone else may end the chain where packets leave: ours stays before it there, so it \
                     sees answers from the VIP, not from the backend"
                );
            }
            passes
        };
        *self.passing.entry(program).or_insert_with(look)
    }
}
