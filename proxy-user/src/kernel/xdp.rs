//! XDP of uplinks, where it is asked for and a link can have it. tc serves every link all the same.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use aya::Ebpf;
use aya::maps::{HashMap, Map, MapData};
use aya::programs::Xdp;
use proxy_common::Outcome;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_DUMP};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;

use super::ask::Asker;
use super::links::PinnedLinks;
use super::load::shortened;
use super::read;
use super::sys::{AttachPoint, Manner};
use super::writer::open;

/// Which uplinks get XDP.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum XdpMode {
    /// None
    Off,
    /// NICs whose driver has it
    Auto,
    /// Those, and veth links
    Native,
    /// The same, in the kernel's general code, which is slower than tc: to try it out
    Generic,
}

/// The program.
const PROGRAM: &str = "portal_relay";
/// How the pins of links begin.
const PIN: &str = "xdp-";

/// Whether a program is only loaded once a link gets XDP.
pub fn is_relay(program: &str) -> bool {
    program == PROGRAM
}

/// The links with XDP.
pub struct Relays {
    mode: XdpMode,
    /// Whether it is to hold off floods, too.
    guards: bool,
    /// How many SYNs had been challenged at the last look.
    challenged: u64,
    map: HashMap<MapData, u32, u32>,
    /// Uplinks that are left to tc, by index, and why.
    left: BTreeMap<u32, String>,
    /// Those with XDP, by index.
    drops: BTreeMap<u32, Drops>,
}

/// What a link has dropped of what was to leave by it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Drops {
    /// In all.
    count: u64,
    /// The last 32 looks, the newest in the lowest bit: whether it was more than at the look before.
    rises: u32,
}

impl Drops {
    /// With one look more. In a flood it tells nothing: there are more challenges than any link takes.
    const fn seen(self, count: u64, is_flooded: bool) -> Self {
        if is_flooded {
            return Self { count, ..self };
        }
        Self { count, rises: self.rises << 1 | (count > self.count) as u32 }
    }

    /// Whether it was so often that the link is left to tc. Then there is no look more.
    const fn are_too_many(self) -> bool {
        self.rises.count_ones() >= 3
    }
}

impl Relays {
    /// Opens the map of those that an earlier agent has attached to.
    pub fn open(mode: XdpMode, guards: bool, maps: &Path) -> Result<Self> {
        Ok(Self {
            mode,
            guards,
            challenged: 0,
            map: HashMap::try_from(Map::HashMap(open(maps, "relays")?))?,
            left: BTreeMap::new(),
            drops: BTreeMap::new(),
        })
    }

    /// Attaches to an uplink, or renews it there; or leaves the link to tc, and says why, once.
    pub fn attach(&mut self, ebpf: &mut Ebpf, pins: &mut PinnedLinks, ifindex: u32) {
        if self.mode == XdpMode::Off {
            return self.take_off(pins, ifindex);
        }
        let done = facts_of(ifindex).map_err(Left::Unknown).and_then(|facts| {
            let manner = fit(self.mode, &facts)?;
            if self.drops.get(&ifindex).is_some_and(|drops| drops.are_too_many()) {
                return Err(Left::Drops);
            }
            put(ebpf, pins, ifindex, manner).map_err(Left::Refused)?;
            self.note(ifindex, manner, &facts).map_err(Left::Refused)?;
            self.drops.entry(ifindex).or_insert(Drops { count: facts.dropped, ..Drops::default() });
            Ok(())
        });
        match done {
            Ok(()) => drop(self.left.remove(&ifindex)),
            Err(left) => {
                // What it has dropped counts on.
                self.drops.retain(|index, drops| *index != ifindex || drops.are_too_many());
                self.take_off(pins, ifindex);
                self.leave(ifindex, &left);
            }
        }
    }

    /// Leaves to tc what drops what XDP sends by it, for good: a driver may say that it has XDP and not send, as a veth link whose other
    /// end does not take part.
    pub fn watch(&mut self, pins: &mut PinnedLinks, root: &Path) {
        let is_flooded = self.is_flooded(root);
        let mut fresh = Vec::new();
        for (ifindex, drops) in self.drops.iter_mut().filter(|(_, drops)| !drops.are_too_many()) {
            let Ok(Some(count)) = dropped_by(*ifindex) else { continue };
            *drops = drops.seen(count, is_flooded);
            fresh.extend(drops.are_too_many().then_some(*ifindex));
        }
        for ifindex in fresh {
            self.take_off(pins, ifindex);
            self.leave(ifindex, &Left::Drops);
        }
    }

    /// Whether clients were challenged since the last look. `root` is the folder of all pins.
    fn is_flooded(&mut self, root: &Path) -> bool {
        if !self.guards {
            return false;
        }
        let outcomes = read::outcomes(root).unwrap_or_default();
        let challenged = outcomes.get(&Outcome::Challenged).copied().unwrap_or_default();
        std::mem::replace(&mut self.challenged, challenged) != challenged
    }

    /// Notes whether it takes part in sending from link to link. Of drivers that is not known before it fails, and then unseen: some have XDP and
    /// no way from link to link, on one end or the other.
    fn note(&mut self, ifindex: u32, manner: Manner, facts: &Facts) -> Result<()> {
        if manner == Manner::Generic || facts.kind == Some(InfoKind::Veth) {
            return self.map.insert(ifindex, 1, 0).context("cannot note it in the map relays");
        }
        let _ = self.map.remove(&ifindex);
        Ok(())
    }

    fn leave(&mut self, ifindex: u32, left: &Left) {
        let name = nix::net::if_::if_indextoname(ifindex);
        let name = name.map_or_else(|_| ifindex.to_string(), |n| n.to_string_lossy().into_owned());
        let lacks = if self.guards { ", without --syn-guard" } else { "" };
        let text = format!("link {name} is served by tc and not by XDP{lacks}: {left}");
        if self.left.get(&ifindex) != Some(&text) {
            tracing::info!("{text}");
        }
        self.left.insert(ifindex, text);
    }

    /// Takes XDP off a link that is gone or is no uplink any more.
    pub fn detach(&mut self, pins: &mut PinnedLinks, ifindex: u32) {
        self.left.remove(&ifindex);
        self.drops.remove(&ifindex);
        self.take_off(pins, ifindex);
    }

    fn take_off(&mut self, pins: &mut PinnedLinks, ifindex: u32) {
        // First, so that no packet is sent to it any more.
        let _ = self.map.remove(&ifindex);
        for manner in [Manner::Native, Manner::Generic] {
            pins.remove(&pin(ifindex, manner));
        }
    }

    /// Takes it off all links but those.
    pub fn keep_only(&mut self, pins: &mut PinnedLinks, ours: &HashSet<u32>) {
        let index = |name: String| name.strip_prefix(PIN)?.split('-').next()?.parse().ok();
        let others: Vec<u32> = pins.names().into_iter().filter_map(index).collect();
        others
            .iter()
            .filter(|ifindex| !ours.contains(ifindex))
            .for_each(|index| self.detach(pins, *index));
    }

    /// How many uplinks have it, and how many were to have it and are left to tc.
    pub fn count(&self) -> [usize; 2] {
        let have = self.drops.values().filter(|drops| !drops.are_too_many());
        [have.count(), self.left.len()]
    }
}

/// Attaches to a link, or renews it there.
fn put(ebpf: &mut Ebpf, pins: &mut PinnedLinks, ifindex: u32, manner: Manner) -> Result<()> {
    let program: &mut Xdp =
        ebpf.program_mut(PROGRAM).context("the object has no portal_relay")?.try_into()?;
    if program.fd().is_err() {
        program.load().map_err(shortened)?;
    }
    // A link can't change its manner.
    let other = match manner {
        Manner::Native => Manner::Generic,
        Manner::Generic => Manner::Native,
    };
    pins.remove(&pin(ifindex, other));
    pins.ensure(&pin(ifindex, manner), program.fd()?, AttachPoint::Xdp { ifindex, manner })?;
    Ok(())
}

fn pin(ifindex: u32, manner: Manner) -> String {
    let manner = match manner {
        Manner::Native => "native",
        Manner::Generic => "generic",
    };
    format!("{PIN}{ifindex}-{manner}")
}

/// What decides whether a link can have it.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
struct Facts {
    /// Its kind; hardware has none.
    kind: Option<InfoKind>,
    /// Whether there are VLANs on it.
    has_vlans: bool,
    /// How much it has dropped of what was to leave by it.
    dropped: u64,
}

/// Why a link is left to tc.
#[derive(Debug)]
enum Left {
    Kind(InfoKind),
    Slow,
    Vlans,
    Drops,
    Unknown(io::Error),
    Refused(anyhow::Error),
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind(kind) => write!(f, "it is a {kind} link, and not a NIC"),
            Self::Slow => f.write_str(
                "it is a veth link, where XDP costs more than it saves (--xdp=native tries it)",
            ),
            Self::Vlans => {
                f.write_str("there are VLANs on it, and their tags may be hidden from XDP")
            }
            Self::Drops => f.write_str("it drops what XDP sends by it"),
            Self::Unknown(error) => write!(f, "cannot ask what it is: {error}"),
            Self::Refused(error) => match error.downcast_ref::<io::Error>().map(io::Error::kind) {
                Some(io::ErrorKind::ResourceBusy | io::ErrorKind::AlreadyExists) => {
                    f.write_str("it has an XDP program of someone else's")
                }
                _ => write!(
                    f,
                    "its driver refuses: {error:#}. A smaller MTU, fewer channels (ethtool -L) or no LRO \
                     (ethtool -K) may help"
                ),
            },
        }
    }
}

/// How a link gets it, in any mode but off.
fn fit(mode: XdpMode, facts: &Facts) -> Result<Manner, Left> {
    let manner = if mode == XdpMode::Generic { Manner::Generic } else { Manner::Native };
    match &facts.kind {
        _ if facts.has_vlans => Err(Left::Vlans),
        Some(InfoKind::Veth) if mode == XdpMode::Auto => Err(Left::Slow),
        None | Some(InfoKind::Veth) => Ok(manner),
        Some(kind) => Err(Left::Kind(kind.clone())),
    }
}

/// Asks for a link, and for what lies on it.
fn facts_of(ifindex: u32) -> io::Result<Facts> {
    let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let all = Asker::open(NETLINK_ROUTE)?.ask(all, NLM_F_DUMP, None)?;
    let links = all.iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    });
    let mut facts = Facts::default();
    for link in links {
        if link.header.index == ifindex {
            facts.kind = kind_of(link).cloned();
            facts.dropped = dropped(link);
        } else if kind_of(link) == Some(&InfoKind::Vlan) {
            facts.has_vlans |= link.attributes.contains(&LinkAttribute::Link(ifindex));
        }
    }
    Ok(facts)
}

/// Asks how much a link has dropped of what was to leave by it.
fn dropped_by(ifindex: u32) -> io::Result<Option<u64>> {
    let mut question = LinkMessage::default();
    question.header.index = ifindex;
    let question = RouteNetlinkMessage::GetLink(question);
    let answers = Asker::open(NETLINK_ROUTE)?.ask(question, NLM_F_ACK, None)?;
    Ok(answers.iter().find_map(|message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(dropped(link)),
        _ => None,
    }))
}

fn dropped(link: &LinkMessage) -> u64 {
    let counts = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Stats64(counts) => Some(counts.tx_dropped),
        _ => None,
    });
    counts.unwrap_or_default()
}

fn kind_of(link: &LinkMessage) -> Option<&InfoKind> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.iter().find_map(|info| match info {
            LinkInfo::Kind(kind) => Some(kind),
            _ => None,
        }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use rtnetlink::packet_route::link::InfoKind;

    use super::{Drops, Facts, Manner, XdpMode, fit};

    #[test]
    fn a_link_that_keeps_dropping_is_left() {
        let after =
            |counts: &[u64]| counts.iter().fold(Drops::default(), |d, count| d.seen(*count, false));
        let now_and_then = [[1; 20], [2; 20], [3; 20], [4; 20]].concat();
        assert!(!after(&now_and_then).are_too_many());
        assert!(after(&[0, 1, 2, 3]).are_too_many());
        assert!(after(&[0, 1, 1, 2, 2, 2, 3]).are_too_many(), "in bursts");
        let flooded = (0..40).fold(Drops::default(), |drops, count| drops.seen(count, true));
        assert!(!flooded.seen(39, false).are_too_many(), "what a flood has dropped");
    }

    #[test]
    fn who_gets_xdp() {
        let plain = |kind| Facts { kind, ..Facts::default() };
        let [nic, veth, bond] = [None, Some(InfoKind::Veth), Some(InfoKind::Bond)].map(plain);
        let shared = Facts { has_vlans: true, ..nic.clone() };
        for (mode, wanted) in [
            (XdpMode::Auto, [Some(Manner::Native), None, None, None]),
            (XdpMode::Native, [Some(Manner::Native), Some(Manner::Native), None, None]),
            (XdpMode::Generic, [Some(Manner::Generic), Some(Manner::Generic), None, None]),
        ] {
            let fits = [&nic, &veth, &bond, &shared].map(|facts| fit(mode, facts).ok());
            assert_eq!(fits, wanted, "{mode:?}");
        }
    }
}
