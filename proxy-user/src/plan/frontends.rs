//! Who has which frontend. Two Services may claim the same one (KP-44 leaves it to chance): the older
//! has it, by creation time and then by name, and the younger gets it when the older gives it up.
//!
//! Which addresses are marked follows from that, and from what the node's own addresses are for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use proxy_common::tables::ServiceValue;

use super::{Lead, Op};
use crate::desired::{Frontend, PortId};
use crate::model::IpFamily;

/// A claim, so that the first in order is the one that counts: a pod's to an address that may not be the
/// node's comes after all others; then creation time, then identity.
type Claim = (bool, String, PortId);

/// What is known of an address.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Mark {
    /// How many frontends it has.
    frontends: usize,
    /// How many of them refuse unused ports.
    refusing: usize,
    /// What it is for the node: flags of [`ServiceValue`].
    node: u32,
    /// The flags that the maps hold; `None` if they hold no mark.
    written: Option<u32>,
}

impl Mark {
    fn wanted(self) -> Option<u32> {
        let refuses = if self.refusing > 0 { ServiceValue::REFUSES } else { 0 };
        (self.frontends > 0 || self.node != 0).then_some(refuses | self.node)
    }
}

/// Claims to frontends, where frontends lead, and the marks of addresses.
#[derive(Default)]
pub struct Frontends {
    /// In the order in which they count.
    claims: HashMap<Frontend, Vec<Claim>>,
    leads: HashMap<Frontend, (PortId, Lead)>,
    marks: HashMap<IpAddr, Mark>,
    /// How many frontends and marks each family's table holds.
    used: HashMap<IpFamily, usize>,
    /// How many it may.
    room: usize,
}

impl Frontends {
    /// None yet, for tables that hold so many frontends and marks of each family.
    pub fn new(room: usize) -> Self {
        Self { room, ..Self::default() }
    }

    /// Adds a claim, or renews it: a Service that was created anew has another time.
    pub fn claim(&mut self, frontend: Frontend, port: &PortId, created: &str) {
        // Mostly there is one.
        let claims = self.claims.entry(frontend).or_insert_with(|| Vec::with_capacity(1));
        claims.retain(|(.., claimant)| claimant != port);
        let is_doubtful = port.is_host_port() && !frontend.vip.is_unspecified();
        let claim = (is_doubtful, created.to_owned(), port.clone());
        let place = claims.partition_point(|other| *other < claim);
        claims.insert(place, claim);
    }

    /// Takes a claim back.
    pub fn release(&mut self, frontend: Frontend, port: &PortId) {
        if let Some(claims) = self.claims.get_mut(&frontend) {
            claims.retain(|(.., claimant)| claimant != port);
            if claims.is_empty() {
                self.claims.remove(&frontend);
            }
        }
    }

    /// Who claims a frontend.
    pub fn claimants(&self, frontend: Frontend) -> impl Iterator<Item = &PortId> {
        self.claims.get(&frontend).into_iter().flatten().map(|(.., claimant)| claimant)
    }

    /// Whose claim to a frontend counts.
    pub fn winner(&self, frontend: Frontend) -> Option<&PortId> {
        Some(&self.claims.get(&frontend)?.first()?.2)
    }

    /// How many frontends and marks the family's table holds.
    pub fn used(&self, family: IpFamily) -> usize {
        self.used.get(&family).copied().unwrap_or_default()
    }

    fn count_entry(&mut self, address: IpAddr, change: impl FnOnce(usize) -> usize) {
        let used = self.used.entry(IpFamily::of(address)).or_default();
        *used = change(*used);
    }

    /// Those of a Service port's frontends that the family's table has no room for, each with the mark of
    /// its address. What is there already needs none.
    pub fn without_room<'a>(
        &self,
        family: IpFamily,
        frontends: impl Iterator<Item = &'a Frontend>,
    ) -> Vec<Frontend> {
        let mut room = self.room.saturating_sub(self.used(family));
        let mut refused = Vec::new();
        for frontend in frontends.filter(|frontend| !self.leads.contains_key(frontend)) {
            let is_marked = |mark: &Mark| mark.written.is_some();
            let needed = if self.marks.get(&frontend.vip).is_some_and(is_marked) { 1 } else { 2 };
            match room.checked_sub(needed) {
                Some(left) => room = left,
                None => refused.push(*frontend),
            }
        }
        refused
    }

    /// Notes that the maps hold a frontend of a Service port whose age is not known.
    pub fn adopt(&mut self, frontend: Frontend, port: &PortId, lead: Lead) {
        self.claim(frontend, port, "");
        if self.leads.insert(frontend, (port.clone(), lead)).is_none() {
            self.count_entry(frontend.vip, |used| used + 1);
        }
        self.count(frontend, None, Some(lead));
    }

    /// Notes that the maps hold a mark, and keeps what it says of the node's addresses until that is
    /// known again.
    pub fn adopt_mark(&mut self, address: IpAddr, flags: u32) {
        let mark = self.marks.entry(address).or_default();
        mark.node = flags & !ServiceValue::REFUSES;
        if mark.written.replace(flags).is_none() {
            self.count_entry(address, |used| used + 1);
        }
    }

    /// Writes all marks that are not as they should be.
    pub fn repair_marks(&mut self, ops: &mut Vec<Op>) {
        let addresses: BTreeSet<IpAddr> = self.marks.keys().copied().collect();
        addresses.into_iter().for_each(|address| self.write_mark(address, ops));
    }

    /// Leads a frontend to the one whose claim counts; `lead` says where the frontends of a Service
    /// port lead.
    pub fn settle(
        &mut self,
        frontend: Frontend,
        lead: impl Fn(&PortId) -> Lead,
        ops: &mut Vec<Op>,
    ) {
        let before = self.leads.get(&frontend).map(|(_, lead)| *lead);
        let after = self.winner(frontend).cloned().map(|winner| {
            let lead = lead(&winner);
            (winner, lead)
        });
        match &after {
            Some((_, lead)) if before == Some(*lead) => {}
            Some((_, lead)) => ops.push(Op::Lead { frontend, lead: *lead }),
            None if before.is_some() => ops.push(Op::Remove { frontend }),
            None => return,
        }
        self.count(frontend, before, after.as_ref().map(|(_, lead)| *lead));
        if let Some(after) = after {
            if self.leads.insert(frontend, after).is_none() {
                self.count_entry(frontend.vip, |used| used + 1);
            }
        } else {
            self.leads.remove(&frontend);
            self.count_entry(frontend.vip, |used| used - 1);
        }
        self.write_mark(frontend.vip, ops);
    }

    /// Says what the node's own addresses are for.
    pub fn set_node(&mut self, addresses: &BTreeMap<IpAddr, u32>, ops: &mut Vec<Op>) {
        let mut changed: BTreeSet<IpAddr> = addresses.keys().copied().collect();
        for (address, mark) in self.marks.iter_mut().filter(|(_, mark)| mark.node != 0) {
            mark.node = 0;
            changed.insert(*address);
        }
        for (address, flags) in addresses {
            self.marks.entry(*address).or_default().node = *flags;
        }
        changed.into_iter().for_each(|address| self.write_mark(address, ops));
    }

    /// Counts what a frontend was and is at its address. A `NodePort` is at none, and a pod's port makes
    /// no address a VIP: it counts only at those that are marked as the node's own.
    fn count(&mut self, frontend: Frontend, before: Option<Lead>, after: Option<Lead>) {
        if frontend.vip.is_unspecified() {
            return;
        }
        let has = |lead: Lead, flag: u32| lead.flags & flag != 0;
        let marks = |lead: Option<Lead>| lead.filter(|lead| !has(*lead, ServiceValue::HOST_PORT));
        let refuses = |lead: Option<Lead>| {
            usize::from(lead.is_some_and(|lead| has(lead, ServiceValue::REFUSES)))
        };
        let (before, after) = (marks(before), marks(after));
        let mark = self.marks.entry(frontend.vip).or_default();
        mark.frontends =
            mark.frontends + usize::from(after.is_some()) - usize::from(before.is_some());
        mark.refusing = mark.refusing + refuses(after) - refuses(before);
    }

    /// The addresses that are `ClusterIPs`, and none of the node's own.
    pub fn cluster_ips(&self) -> impl Iterator<Item = IpAddr> {
        let is_cluster_ip = |mark: &Mark| mark.refusing > 0 && mark.node == 0;
        self.marks.iter().filter(move |(_, mark)| is_cluster_ip(mark)).map(|(address, _)| *address)
    }

    fn write_mark(&mut self, address: IpAddr, ops: &mut Vec<Op>) {
        let Some(mark) = self.marks.get_mut(&address) else { return };
        let wanted = mark.wanted();
        let before = std::mem::replace(&mut mark.written, wanted);
        if wanted.is_none() {
            self.marks.remove(&address);
        }
        if before != wanted {
            ops.push(match wanted {
                Some(flags) => Op::Mark { address, flags },
                None => Op::Unmark { address },
            });
            let (gone, come) = (usize::from(before.is_some()), usize::from(wanted.is_some()));
            self.count_entry(address, |used| used + come - gone);
        }
    }
}
