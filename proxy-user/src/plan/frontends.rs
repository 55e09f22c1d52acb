//! Who has which frontend. Two Services may claim the same one (KP-44 leaves it to chance): the older
//! has it, by creation time and then by name, and the younger gets it when the older gives it up.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use proxy_common::tables::Range;

use super::Op;
use crate::desired::{Frontend, PortId};

/// A claim: creation time, then identity, so that the first in order is the one that counts.
type Claim = (String, PortId);

/// Claims to frontends, where frontends lead, and which addresses are marked as VIPs.
#[derive(Default)]
pub struct Frontends {
    claims: HashMap<Frontend, BTreeSet<Claim>>,
    leads: HashMap<Frontend, PortId>,
    /// How many frontends an address has.
    marks: HashMap<IpAddr, usize>,
}

impl Frontends {
    /// Adds a claim, or renews it: a Service that was created anew has another time.
    pub fn claim(&mut self, frontend: Frontend, port: &PortId, created: &str) {
        let claims = self.claims.entry(frontend).or_default();
        claims.retain(|(_, claimant)| claimant != port);
        claims.insert((created.to_owned(), port.clone()));
    }

    /// Takes a claim back.
    pub fn release(&mut self, frontend: Frontend, port: &PortId) {
        if let Some(claims) = self.claims.get_mut(&frontend) {
            claims.retain(|(_, claimant)| claimant != port);
            if claims.is_empty() {
                self.claims.remove(&frontend);
            }
        }
    }

    /// Whose claim to a frontend counts.
    pub fn winner(&self, frontend: Frontend) -> Option<&PortId> {
        Some(&self.claims.get(&frontend)?.first()?.1)
    }

    /// Whether a frontend leads to a Service port.
    pub fn leads(&self, frontend: Frontend, port: &PortId) -> bool {
        self.leads.get(&frontend) == Some(port)
    }

    /// The addresses that are marked as VIPs.
    pub fn vips(&self) -> BTreeSet<IpAddr> {
        self.marks.keys().copied().collect()
    }

    /// Notes that the maps hold a frontend of a Service port whose age is not known.
    pub fn adopt(&mut self, frontend: Frontend, port: &PortId) {
        self.claim(frontend, port, "");
        self.leads.insert(frontend, port.clone());
        *self.marks.entry(frontend.vip).or_default() += 1;
    }

    /// Leads a frontend to the one whose claim counts; `place` knows the number and the slots of
    /// Service ports.
    pub fn settle(
        &mut self,
        frontend: Frontend,
        place: impl Fn(&PortId) -> (u32, Range),
        ops: &mut Vec<Op>,
    ) {
        let Some(winner) = self.winner(frontend).cloned() else {
            if self.leads.remove(&frontend).is_some() {
                ops.push(Op::Remove { frontend });
                self.unmark(frontend.vip, ops);
            }
            return;
        };
        if self.leads(frontend, &winner) {
            return;
        }
        let (id, range) = place(&winner);
        ops.push(Op::Lead { frontend, id, range });
        if self.leads.insert(frontend, winner).is_none() {
            self.mark(frontend.vip, ops);
        }
    }

    fn mark(&mut self, vip: IpAddr, ops: &mut Vec<Op>) {
        let marks = self.marks.entry(vip).or_default();
        *marks += 1;
        if *marks == 1 {
            ops.push(Op::MarkVip { vip });
        }
    }

    fn unmark(&mut self, vip: IpAddr, ops: &mut Vec<Op>) {
        let marks = self.marks.get_mut(&vip).expect("it was marked");
        *marks -= 1;
        if *marks == 0 {
            self.marks.remove(&vip);
            ops.push(Op::UnmarkVip { vip });
        }
    }
}
