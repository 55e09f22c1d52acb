//! The slices of one Service, with their endpoints in order: a change costs in proportion to the change, and
//! a plan one walk.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::{Endpoint, Slice};

/// Where an endpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    /// Its address, as IPv6.
    address: u128,
    /// Which of `all`.
    slice: u32,
    /// Which of its endpoints.
    position: u32,
}

fn as_number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    }
}

/// The slices of one Service.
#[derive(Clone, Default, Debug)]
pub struct Slices {
    /// Which of `all` has a name.
    by_name: BTreeMap<String, u32>,
    all: Vec<Option<(String, Slice)>>,
    /// All endpoints by address; those at one address by the names of their slices (KP-13).
    order: Vec<Place>,
}

impl Slices {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// The slice of that name.
    pub fn get(&self, name: &str) -> Option<&Slice> {
        let (_, slice) = self.all[*self.by_name.get(name)? as usize].as_ref()?;
        Some(slice)
    }

    /// All slices, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Slice> {
        let slices = self.by_name.values().filter_map(|number| self.all[*number as usize].as_ref());
        slices.map(|(_, slice)| slice)
    }

    /// Hands all endpoints to `each`, in the order of their addresses; those at one address in the order of the
    /// names of their slices. With each comes what was made of its slice.
    pub fn for_each<'a, T>(
        &'a self,
        of_slice: impl Fn(&Slice) -> T,
        mut each: impl FnMut(&T, &'a Endpoint),
    ) {
        let of_all = self.all.iter().map(|slice| slice.as_ref().map(|(_, slice)| of_slice(slice)));
        let of_all: Vec<Option<T>> = of_all.collect();
        for Place { slice, position, .. } in &self.order {
            if let (Some(made), Some((_, slice))) =
                (&of_all[*slice as usize], &self.all[*slice as usize])
            {
                each(made, &slice.endpoints[*position as usize]);
            }
        }
    }

    /// Puts a slice in the place of the one of that name.
    pub fn set(&mut self, name: &str, slice: Slice) {
        self.remove(name);
        let free = self.all.iter().position(Option::is_none).unwrap_or(self.all.len());
        let number = u32::try_from(free).expect("a Service has fewer slices");
        self.order.extend((0..).zip(&slice.endpoints).map(|(position, endpoint)| Place {
            address: as_number(endpoint.address),
            slice: number,
            position,
        }));
        if free == self.all.len() {
            self.all.push(None);
        }
        self.all[free] = Some((name.to_owned(), slice));
        self.by_name.insert(name.to_owned(), number);
        let name_of =
            |place: &Place| self.all[place.slice as usize].as_ref().map(|(name, _)| name.as_str());
        // Those of before are in order: this merges the new ones into them.
        self.order.sort_by(|a, b| {
            let by_name = || name_of(a).cmp(&name_of(b)).then(a.position.cmp(&b.position));
            a.address.cmp(&b.address).then_with(by_name)
        });
    }

    /// Removes the slice of that name.
    pub fn remove(&mut self, name: &str) {
        let Some(number) = self.by_name.remove(name) else { return };
        self.all[number as usize] = None;
        self.order.retain(|place| place.slice != number);
    }
}
