//! How backends share a run of slots: Maglev's table, where a number stands for a backend as far as
//! possible also after others come and go; or each as often as its weight says.

use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};

use fnv::FnvHasher;
use proxy_common::tables::Algorithm;

/// Lengths of Maglev's table: primes, and few, since in a table of another length every number stands
/// for another backend.
const LENGTHS: [usize; 6] = [61, 251, 1021, 4093, 16_381, 65_521];
/// Slots per backend in Maglev's table: shares then differ by an eighth at most.
const SLOTS_PER_BACKEND: usize = 8;
/// Slots of the smallest weight in Maglev's table.
const SLOTS_PER_WEIGHT: usize = 4;
/// Weights ask for no longer run than this, unless there are more backends.
const LONGEST: usize = 4093;

/// The backend in each slot, by its position in `backends`, which are sorted. The same on every node.
pub fn spread(algorithm: Algorithm, backends: &[(SocketAddr, u16)]) -> Vec<usize> {
    let weights: Vec<usize> =
        backends.iter().map(|(_, weight)| usize::from(*weight).max(1)).collect();
    if backends.len() < 2 {
        return (0..backends.len()).collect();
    }
    match algorithm {
        Algorithm::Maglev | Algorithm::SourceHash => maglev(backends, &weights),
        Algorithm::Random | Algorithm::RoundRobin | Algorithm::LeastConn => interleaved(&weights),
    }
}

/// As [`spread`], with no more slots than there are backends: for when there is no room.
pub fn sparse(backends: &[(SocketAddr, u16)]) -> Vec<usize> {
    (0..backends.len()).collect()
}

/// Maglev's table (Eisenbud et al., NSDI 2016, section 3.4): each backend takes the next free slot of a
/// permutation of its own in turn; one of half the highest weight every other time.
fn maglev(backends: &[(SocketAddr, u16)], weights: &[usize]) -> Vec<usize> {
    let size = length(weights);
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

fn length(weights: &[usize]) -> usize {
    let (total, smallest) = (weights.iter().sum::<usize>(), weights.iter().min());
    let for_smallest = SLOTS_PER_WEIGHT * total / smallest.expect("there are backends");
    let wanted = for_smallest.min(LONGEST).max(SLOTS_PER_BACKEND * weights.len());
    let longest = LENGTHS[LENGTHS.len() - 1];
    LENGTHS.into_iter().find(|length| *length >= wanted).unwrap_or(longest)
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

/// A hash that is the same on every machine and in every version.
fn stable_hash(backend: SocketAddr, salt: u8) -> u64 {
    let address = match backend.ip() {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
        IpAddr::V6(ip) => ip.octets(),
    };
    let mut hasher = FnvHasher::default();
    hasher.write(&address);
    hasher.write(&backend.port().to_be_bytes());
    hasher.write(&[salt]);
    // FNV's last bytes reach its high bits late.
    let hash = hasher.finish();
    (hash ^ (hash >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9)
}

/// Each backend as often as its weight says, as far from itself as possible.
fn interleaved(weights: &[usize]) -> Vec<usize> {
    let units = units(weights);
    let mut places: Vec<(usize, usize)> = Vec::new();
    for (backend, units) in units.iter().enumerate() {
        // In the middle of each of its equal parts of the whole.
        places.extend((0..*units).map(|unit| (((2 * unit + 1) << 32) / units, backend)));
    }
    places.sort_unstable();
    places.into_iter().map(|(_, backend)| backend).collect()
}

/// The weights in lowest terms, and not more slots than a table may have.
fn units(weights: &[usize]) -> Vec<usize> {
    let divisor = weights.iter().copied().fold(0, greatest_common_divisor);
    let total: usize = weights.iter().map(|weight| weight / divisor).sum();
    let longest = LONGEST.max(weights.len());
    if total <= longest {
        return weights.iter().map(|weight| weight / divisor).collect();
    }
    weights.iter().map(|weight| (weight / divisor * longest / total).max(1)).collect()
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn backends(weights: &[u16]) -> Vec<(SocketAddr, u16)> {
        let address = |host: u16| {
            SocketAddr::from(([10, 0, host.to_be_bytes()[0], host.to_be_bytes()[1]], 8080))
        };
        (1..).zip(weights).map(|(host, weight)| (address(host), *weight)).collect()
    }

    fn shares(table: &[usize], count: usize) -> Vec<usize> {
        (0..count).map(|backend| table.iter().filter(|slot| **slot == backend).count()).collect()
    }

    #[test]
    fn maglev_spreads_evenly() {
        for count in [2, 3, 10, 100, 1000] {
            let table = spread(Algorithm::Maglev, &backends(&vec![1; count]));
            let shares = shares(&table, count);
            let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
            assert!(most - least <= 1, "{count} backends: {least} to {most} slots");
        }
    }

    #[test]
    fn maglev_disturbs_few_flows_when_a_backend_goes() {
        for count in 3..=130 {
            // With one more the table has another length (docs/decisions/0012).
            if [8, 32, 128].contains(&count) {
                continue;
            }
            let all = backends(&vec![1; count]);
            let before = spread(Algorithm::Maglev, &all);
            for gone in [0, count / 2, count - 1] {
                let mut rest = all.clone();
                rest.remove(gone);
                let after = spread(Algorithm::Maglev, &rest);
                assert_eq!(before.len(), after.len(), "{count} backends");
                let slots = before.iter().zip(&after);
                let moved = slots.filter(|(was, is)| **was != gone && all[**was] != rest[**is]);
                let percent = 100 * moved.count() / before.len();
                assert!(percent <= 12, "{count} backends without {gone}: {percent} % moved");
            }
        }
    }

    proptest! {
        #[test]
        fn shares_are_as_weights_say(weights in proptest::collection::vec(1..20_u16, 2..8)) {
            let all = backends(&weights);
            let total: u16 = weights.iter().sum();
            for algorithm in Algorithm::ALL {
                let table = spread(algorithm, &all);
                for (share, weight) in shares(&table, all.len()).iter().zip(&weights) {
                    let wanted = table.len() * usize::from(*weight) / usize::from(total);
                    prop_assert!(share.abs_diff(wanted) <= 2, "{share} of {}, not {wanted}", table.len());
                }
            }
        }
    }
}
