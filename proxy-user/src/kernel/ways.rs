//! The ways that lead to backends: each is written once, and shared by all backends that it leads to. A
//! backend that gets another way gets another number, in one store.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use proxy_common::Family;
use proxy_common::tables::Way;

use super::mapped::Mapped;
use super::read::FromIp;
use crate::plan::Numbers;
use crate::routes::Route;

/// How long a way is kept after the last backend has left it: whoever is about to read it has done so.
const GRACE: Duration = Duration::from_secs(1);
/// The number that says that there is no way.
const NONE: u32 = 0;

/// One family's ways.
pub struct Ways<F: Family> {
    rows: Mapped<Way<F>>,
    numbers: Numbers,
    /// The numbers of those in use, and how many backends they lead to.
    used: HashMap<Route, (u32, usize)>,
}

impl<F: Family> Ways<F>
where
    F::Addr: FromIp,
{
    /// No ways yet.
    pub fn new(rows: Mapped<Way<F>>) -> Self {
        let numbers = Numbers::new(NONE + 1, rows.length());
        Self { rows, numbers, used: HashMap::new() }
    }

    /// Forgets all, since what the table holds is read back.
    pub fn clear(&mut self) {
        self.numbers = Numbers::new(NONE + 1, self.rows.length());
        self.used.clear();
    }

    /// How many ways there are, and how many there can be.
    pub fn usage(&self) -> (usize, usize) {
        (self.used.len(), self.rows.length() as usize - 1)
    }

    /// Takes over that a backend has a way.
    ///
    /// # Errors
    /// If the table can't be read.
    pub fn adopt(&mut self, number: u32) -> io::Result<()> {
        if let Some(route) = self.route(number)? {
            self.used.entry(route).or_insert((number, 0)).1 += 1;
            self.numbers.adopt(number, 0);
        }
        Ok(())
    }

    /// The way that a number stands for.
    fn route(&self, number: u32) -> io::Result<Option<Route>> {
        if number == NONE || number >= self.rows.length() {
            return Ok(None);
        }
        let Way { source, link, mtu, hop, .. } = self.rows.get(number)?;
        let hop: IpAddr = hop.into();
        let hop = (!hop.is_unspecified()).then_some(hop);
        Ok((link != 0).then(|| Route { source: source.into(), link, mtu, hop }))
    }

    /// The number of a way for one more backend; 0 if there is no way, or no number for it.
    ///
    /// # Errors
    /// If the table can't be written.
    pub fn take(&mut self, now: Instant, route: Option<&Route>) -> io::Result<u32> {
        let source = route.and_then(|route| F::Addr::from_ip(route.source));
        let (Some(route), Some(source)) = (route, source) else { return Ok(NONE) };
        if let Some((number, users)) = self.used.get_mut(route) {
            *users += 1;
            return Ok(*number);
        }
        self.numbers.reclaim(now);
        let Some(number) = self.numbers.take() else {
            tracing::warn!(
                "there are more than {} ways to backends: flows to those behind the others are not \
                 masqueraded, and so refused from outside",
                self.rows.length() - 1
            );
            return Ok(NONE);
        };
        let hop = route.hop.and_then(F::Addr::from_ip).unwrap_or_else(Zeroable::zeroed);
        self.rows.set(number, Way { source, link: route.link, mtu: route.mtu, pad: 0, hop })?;
        self.used.insert(*route, (number, 1));
        Ok(number)
    }

    /// A backend has left a way.
    ///
    /// # Errors
    /// If the table can't be read.
    pub fn leave(&mut self, now: Instant, number: u32) -> io::Result<()> {
        let Some(route) = self.route(number)? else { return Ok(()) };
        let Some((_, users)) = self.used.get_mut(&route) else { return Ok(()) };
        *users -= 1;
        if *users == 0 {
            self.used.remove(&route);
            self.numbers.retire(now + GRACE, number);
        }
        Ok(())
    }
}
