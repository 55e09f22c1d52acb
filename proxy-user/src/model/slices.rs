//! The slices of one Service, with their endpoints in order: a change costs in proportion to the change, and
//! a plan one walk.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::Range;

use super::{Endpoint, Slice};

/// Where an endpoint is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    /// Its address, as IPv6, in two halves: one number would have to be aligned as such.
    address: [u64; 2],
    /// Which of `all`.
    slice: u32,
    /// Which of its endpoints.
    position: u32,
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half")]
fn halves(address: IpAddr) -> [u64; 2] {
    let number = match address {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
        IpAddr::V6(ip) => ip.to_bits(),
    };
    [(number >> 64) as u64, number as u64]
}

/// The slices of one Service.
#[derive(Clone, Default, Debug)]
pub struct Slices {
    /// Which of `all` has a name; in the order of their names.
    by_name: Vec<(String, u32)>,
    all: Vec<Option<(String, Slice)>>,
    /// All endpoints by address; those at one address by the names of their slices (KP-13).
    order: Vec<Place>,
}

impl Slices {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// How many endpoints there are.
    pub fn endpoints(&self) -> usize {
        self.order.len()
    }

    /// The slice of that name.
    pub fn get(&self, name: &str) -> Option<&Slice> {
        let at = self.find(name).ok()?;
        let (_, slice) = self.all[self.by_name[at].1 as usize].as_ref()?;
        Some(slice)
    }

    /// All slices, in the order of their names.
    pub fn iter(&self) -> impl Iterator<Item = &Slice> + Clone {
        let of = |(_, number): &(String, u32)| self.all[*number as usize].as_ref();
        self.by_name.iter().filter_map(of).map(|(_, slice)| slice)
    }

    /// Where a name is among the names, or would be.
    fn find(&self, name: &str) -> Result<usize, usize> {
        self.by_name.binary_search_by(|(known, _)| known.as_str().cmp(name))
    }

    /// The endpoints at an address, each with its slice, in the order of the names of those.
    pub fn at(&self, address: IpAddr) -> impl Iterator<Item = (&Slice, &Endpoint)> {
        self.order[self.places(address)].iter().filter_map(|place| {
            let (_, slice) = self.all[place.slice as usize].as_ref()?;
            Some((slice, &slice.endpoints[place.position as usize]))
        })
    }

    /// Notes whether the endpoints at an address are on this node, whose own addresses are these. True if that has changed.
    pub fn move_to(&mut self, address: IpAddr, own: &BTreeSet<IpAddr>) -> bool {
        let mut has_changed = false;
        for place in &self.order[self.places(address)] {
            let Some((_, slice)) = &mut self.all[place.slice as usize] else { continue };
            let endpoint = &mut slice.endpoints[place.position as usize];
            let local = endpoint.named_here || own.contains(&address);
            has_changed |= std::mem::replace(&mut endpoint.local, local) != local;
        }
        has_changed
    }

    /// Where an address is in the order.
    fn places(&self, address: IpAddr) -> Range<usize> {
        let address = halves(address);
        let first = self.order.partition_point(|place| place.address < address);
        let others = &self.order[first..];
        first..first + others.partition_point(|place| place.address == address)
    }

    /// Whether endpoints have one address.
    pub fn repeats_addresses(&self) -> bool {
        self.order.windows(2).any(|pair| pair[0].address == pair[1].address)
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
        let places = (0..).zip(&slice.endpoints).map(|(position, endpoint)| Place {
            address: halves(endpoint.address),
            slice: number,
            position,
        });
        let mut places: Vec<Place> = places.collect();
        places.sort_by_key(|place| place.address);
        if free == self.all.len() {
            // Most Services have one.
            self.all.reserve_exact(usize::from(free == 0));
            self.all.push(None);
        }
        self.all[free] = Some((name.to_owned(), slice));
        let place = self.find(name).unwrap_or_else(|place| place);
        self.by_name.reserve_exact(usize::from(self.by_name.is_empty()));
        self.by_name.insert(place, (name.to_owned(), number));
        let name_of = |known: &Place| self.all[known.slice as usize].as_ref().map(|(name, _)| name);
        merge(&mut self.order, &places, |known, new| {
            known.address < new.address
                || known.address == new.address && name_of(known) < name_of(new)
        });
    }

    /// Removes the slice of that name.
    pub fn remove(&mut self, name: &str) -> Option<Slice> {
        let place = self.find(name).ok()?;
        let (_, number) = self.by_name.remove(place);
        self.order.retain(|place| place.slice != number);
        self.all[number as usize].take().map(|(_, slice)| slice)
    }
}

/// Puts `new` ones among others, where they belong by `is_before`; both are in order. What lies between two of them is
/// moved once.
fn merge(order: &mut Vec<Place>, new: &[Place], is_before: impl Fn(&Place, &Place) -> bool) {
    let mut end = order.len();
    order.extend_from_slice(new);
    let mut free = order.len();
    for place in new.iter().rev() {
        let at = order[..end].partition_point(|known| is_before(known, place));
        order.copy_within(at..end, free - (end - at));
        free -= end - at + 1;
        order[free] = *place;
        end = at;
    }
}

/// The addresses of the endpoints that a slice has and the one before it had not, or the other way round.
pub fn changed(before: Option<&Slice>, after: &Slice) -> BTreeSet<IpAddr> {
    let Some(before) = before else { return addresses(after) };
    // Of endpoints at one address their order tells which counts.
    let repeats = |slice: &Slice| addresses(slice).len() < slice.endpoints.len();
    if before.ports != after.ports || repeats(before) || repeats(after) {
        return &addresses(before) | &addresses(after);
    }
    let [old, new] = [before, after].map(|slice| slice.endpoints.iter().collect::<BTreeSet<_>>());
    old.symmetric_difference(&new).map(|endpoint| endpoint.address).collect()
}

/// The addresses of a slice's endpoints.
pub fn addresses(slice: &Slice) -> BTreeSet<IpAddr> {
    slice.endpoints.iter().map(|endpoint| endpoint.address).collect()
}
