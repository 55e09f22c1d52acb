//! How backends share the numbers that new flows draw: Maglev's table, where a number stands for a backend as
//! far as possible also after others come and go; or each as often as its weight says.

use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};

use fnv::FnvHasher;
use proxy_common::tables::Algorithm;

/// Lengths of Maglev's table: primes, and few, since in a table of another length every number stands
/// for another backend.
const LENGTHS: [usize; 11] = [31, 61, 127, 251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749];
/// Of more backends than this there is no Maglev's table, which would take longer to make than a change may: each
/// has the same share without one, or what its weight says.
pub const MOST: usize = 4_093;
/// Weights may ask for so many times the slots that as many backends without weights would get: the
/// table is for all.
const MORE_FOR_WEIGHTS: usize = 4;
/// Slots of the smallest weight in Maglev's table, as far as that allows.
const SLOTS_PER_WEIGHT: usize = 4;

/// How many slots for each backend there are in a table, at most: the more room, the more even are the
/// shares of Maglev's. With one there is no table.
pub const SHARES: [usize; 4] = [8, 4, 2, 1];

/// A backend with its weight.
pub type Weighted = (SocketAddr, u16);

/// The position in each slot of a table, with about `share` slots for each backend. The same on every node.
/// `backends` are sorted. `None` if every backend has one slot, in their order, so that no table is needed.
pub fn spread(algorithm: Algorithm, backends: &[Weighted], share: usize) -> Option<Vec<u32>> {
    let size = length(algorithm, backends, share);
    if size == 0 {
        return None;
    }
    let weights = weights(backends);
    let table = if is_by_hash(algorithm) && share > 1 && backends.len() <= MOST {
        maglev(backends, &units(&weights, size), size)
    } else {
        interleaved(&units(&weights, size))
    };
    Some(table.into_iter().map(|position| u32::try_from(position).expect("it is small")).collect())
}

/// How long that table is, at most; 0 if there is none.
pub fn length(algorithm: Algorithm, backends: &[Weighted], share: usize) -> usize {
    let count = backends.len();
    let equal = backends.windows(2).all(|pair| pair[0].1 == pair[1].1);
    let is_maglev = is_by_hash(algorithm) && share > 1 && count <= MOST;
    if count < 2 || equal && !is_maglev {
        return 0;
    }
    let weights = weights(backends);
    let most = MORE_FOR_WEIGHTS * if is_maglev { share } else { 1 } * count;
    if !is_maglev {
        return lowest_terms(&weights).into_iter().sum::<usize>().min(most.max(count));
    }
    let smallest = weights.iter().min().expect("there are backends");
    let for_smallest = SLOTS_PER_WEIGHT * weights.iter().sum::<usize>() / smallest;
    let wanted = if equal { share * count } else { for_smallest.min(most).max(share * count) };
    let longest = LENGTHS[LENGTHS.len() - 1];
    LENGTHS.into_iter().find(|length| *length >= wanted).unwrap_or(longest)
}

const fn is_by_hash(algorithm: Algorithm) -> bool {
    matches!(algorithm, Algorithm::Maglev | Algorithm::SourceHash)
}

fn weights(backends: &[Weighted]) -> Vec<usize> {
    backends.iter().map(|(_, weight)| usize::from(*weight).max(1)).collect()
}

/// Maglev's table (Eisenbud et al., NSDI 2016, section 3.4): each backend takes the next free slot of a
/// permutation of its own in turn; one of half the highest weight every other time.
fn maglev(backends: &[Weighted], weights: &[usize], size: usize) -> Vec<usize> {
    let highest = *weights.iter().max().expect("there are backends");
    let mut permutations: Vec<Permutation> =
        backends.iter().map(|(address, _)| Permutation::new(*address, size)).collect();
    // Half a turn in advance, so that shares are rounded and not cut off.
    let mut credits = vec![highest / 2; backends.len()];
    let mut table = vec![usize::MAX; size];
    let mut free = size;
    loop {
        for (backend, weight) in weights.iter().enumerate() {
            credits[backend] += weight;
            if credits[backend] < highest {
                continue;
            }
            credits[backend] -= highest;
            let slot = permutations[backend].find(|slot| table[*slot] == usize::MAX);
            table[slot.expect("a permutation reaches every slot")] = backend;
            free -= 1;
            if free == 0 {
                return table;
            }
        }
    }
}

/// All slots, in an order of a backend's own.
struct Permutation {
    next: usize,
    step: usize,
    size: usize,
}

impl Permutation {
    fn new(backend: SocketAddr, size: usize) -> Self {
        let number = |salt| usize::try_from(stable_hash(backend, salt) >> 32).expect("32 bits");
        Self { next: number(1) % size, step: number(2) % (size - 1) + 1, size }
    }
}

impl Iterator for Permutation {
    type Item = usize;

    fn next(&mut self) -> Option<usize> {
        let slot = self.next;
        self.next = (self.next + self.step) % self.size;
        Some(slot)
    }
}

/// A hash that is the same on every machine and in every version. Of the address alone: the ports of one
/// Service differ in their target port, and share a table all the same.
fn stable_hash(backend: SocketAddr, salt: u8) -> u64 {
    let address = match backend.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let mut hasher = FnvHasher::default();
    hasher.write(&address);
    hasher.write(&[salt]);
    // FNV's last bytes reach its high bits late.
    let hash = hasher.finish();
    (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Each backend so many times, as far from itself as possible.
fn interleaved(units: &[usize]) -> Vec<usize> {
    let mut places: Vec<(usize, usize)> = Vec::new();
    for (backend, units) in units.iter().enumerate() {
        // In the middle of each of its equal parts of the whole.
        places.extend((0..*units).map(|unit| (((2 * unit + 1) << 32) / units, backend)));
    }
    places.sort_unstable();
    places.into_iter().map(|(_, backend)| backend).collect()
}

/// How many slots each weight gets of `size`: in lowest terms if those fit, and at least one each.
fn units(weights: &[usize], size: usize) -> Vec<usize> {
    let lowest = lowest_terms(weights);
    let total: usize = lowest.iter().sum();
    if total <= size {
        return lowest;
    }
    // One for each, and the rest as the weights say.
    let rest = size - weights.len();
    lowest.iter().map(|weight| 1 + weight * rest / total).collect()
}

fn lowest_terms(weights: &[usize]) -> Vec<usize> {
    let divisor = weights.iter().copied().fold(0, greatest_common_divisor);
    weights.iter().map(|weight| weight / divisor).collect()
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backends(weights: &[u16]) -> Vec<Weighted> {
        let address = |host: u32| SocketAddr::from(((0x0a00_0000 + host).to_be_bytes(), 8080));
        (1..).zip(weights).map(|(host, weight)| (address(host), *weight)).collect()
    }

    fn table(algorithm: Algorithm, backends: &[Weighted], share: usize) -> Vec<usize> {
        match spread(algorithm, backends, share) {
            Some(table) => table.into_iter().map(|position| position as usize).collect(),
            None => (0..backends.len()).collect(),
        }
    }

    fn shares(table: &[usize], count: usize) -> Vec<usize> {
        let mut shares = vec![0; count];
        table.iter().for_each(|position| shares[*position] += 1);
        shares
    }

    #[test]
    fn lengths_are_prime() {
        for length in LENGTHS {
            let root = length.isqrt();
            assert!((2..=root).all(|divisor| length % divisor != 0), "{length}");
        }
    }

    #[test]
    fn backends_without_weights_have_equal_shares_with_any_room() {
        for count in [2, 3, 10, 100, 1000, 4093, 4094, 100_000] {
            for share in SHARES {
                let all = backends(&vec![1; count]);
                let shares = shares(&table(Algorithm::Maglev, &all, share), count);
                let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
                assert!(
                    *least > 0 && most - least <= 1,
                    "{count} backends: {least} to {most} slots"
                );
                if (8..=MOST).contains(&count) && share > 1 {
                    assert!(*least >= share, "{count} backends: {least} of {share}");
                }
            }
        }
    }

    #[test]
    fn maglev_disturbs_few_flows_when_a_backend_goes() {
        for count in 3..=130 {
            // With one more the table has another length (docs/decisions/0012).
            if [4, 8, 16, 32, 64, 128].contains(&count) {
                continue;
            }
            let all = backends(&vec![1; count]);
            let before = table(Algorithm::Maglev, &all, 8);
            for gone in [0, count / 2, count - 1] {
                let mut rest = all.clone();
                rest.remove(gone);
                let after = table(Algorithm::Maglev, &rest, 8);
                assert_eq!(before.len(), after.len(), "{count} backends");
                let slots = before.iter().zip(&after);
                let moved = slots.filter(|(was, is)| **was != gone && all[**was] != rest[**is]);
                let percent = 100 * moved.count() / before.len();
                assert!(percent <= 15, "{count} backends without {gone}: {percent} % moved");
            }
        }
    }

    #[test]
    fn no_weight_takes_the_table() {
        for algorithm in Algorithm::ALL {
            for (weights, most) in [(vec![1000, 1], 64), (vec![1000, 999, 1], 127)] {
                assert!(length(algorithm, &backends(&weights), 8) <= 2 * most, "{algorithm:?}");
                let heavy = shares(&table(algorithm, &backends(&weights), 8), weights.len());
                assert!(heavy.iter().all(|share| *share > 0));
                assert!(heavy[0] >= 4 * heavy[weights.len() - 1], "{algorithm:?}: {heavy:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn shares_are_as_weights_say(weights in proptest::collection::vec(1..20_u16, 2..8)) {
            let all = backends(&weights);
            let total: u16 = weights.iter().sum();
            for algorithm in Algorithm::ALL {
                let table = table(algorithm, &all, 8);
                for (share, weight) in shares(&table, all.len()).iter().zip(&weights) {
                    let wanted = table.len() * usize::from(*weight) / usize::from(total);
                    prop_assert!(share.abs_diff(wanted) <= 2, "{share} of {}, not {wanted}", table.len());
                }
            }
        }

        #[test]
        fn weights_survive_with_little_room(weights in proptest::collection::vec(1..20_u16, 2..8)) {
            let all = backends(&weights);
            for algorithm in Algorithm::ALL {
                let table = table(algorithm, &all, 1);
                let shares = shares(&table, all.len());
                let heaviest = (0..weights.len()).max_by_key(|at| weights[*at]).unwrap();
                let lightest = (0..weights.len()).min_by_key(|at| weights[*at]).unwrap();
                prop_assert!(shares[lightest] > 0);
                prop_assert!(weights[heaviest] < 2 * weights[lightest] || shares[heaviest] > shares[lightest]);
            }
        }
    }
}
