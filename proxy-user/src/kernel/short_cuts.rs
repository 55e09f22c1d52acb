//! Short cuts past the host stack, for flows that it lets pass as they are (docs/decisions/0023). The datapath asks for one;
//! here it is looked whether the flow may have it, the kernel's table of connections is told, and then both ends
//! of it are written. The datapath uses it, and gives it up, by itself.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use aya::maps::{HashMap as HashTable, Map, MapData, RingBuf};
use proxy_common::tables::{Backend, FlowKey, FlowValue, ShortCut, Side, State, Way};
use proxy_common::{Family, V4, V6, proto};

use super::caught::Caught;
use super::conntrack::{self, Conntrack};
use super::mapped::Mapped;
use super::name_of;
use super::writer::{open, open_mapped};

/// How many wishes are looked at at once.
const MOST: usize = 4096;
/// Replaces an element only if it is there.
const EXIST: u64 = 2;

/// The datapath's wishes, as they come.
pub struct Wishes {
    ring: RingBuf<MapData>,
    maps: PathBuf,
    /// Who got a short cut.
    granted: Keys,
    /// Who wishes for one.
    wished: Keys,
    /// Connections that were caught.
    caught: Keys,
}

/// Keys of flows, of each family.
#[derive(Default)]
pub struct Keys {
    /// Of IPv4.
    pub v4: Vec<FlowKey<V4>>,
    /// Of IPv6.
    pub v6: Vec<FlowKey<V6>>,
}

impl Keys {
    /// How many.
    pub fn count(&self) -> usize {
        self.v4.len() + self.v6.len()
    }
}

/// What comes of wishes.
pub struct Granted {
    /// Who got a short cut.
    pub keys: Keys,
    /// Why others did not.
    pub error: Option<anyhow::Error>,
}

impl Wishes {
    /// Those of the programs that use the maps of a folder.
    ///
    /// # Errors
    /// If the map can't be opened.
    pub fn open(maps: &Path) -> Result<Self> {
        let ring = RingBuf::try_from(Map::RingBuf(open(maps, "wishes")?))?;
        let (granted, wished, caught) = Default::default();
        Ok(Self { ring, maps: maps.to_owned(), granted, wished, caught })
    }

    /// Connections that were caught behind the kernel's NAT since the last call; `None` if there were none.
    pub fn take_caught(&mut self) -> Option<Caught> {
        self.drain();
        let keys = std::mem::take(&mut self.caught);
        (keys.count() > 0).then(|| Caught { maps: self.maps.clone(), keys })
    }

    /// Takes in what the datapath has said.
    fn drain(&mut self) {
        for _ in 0..MOST {
            let Some(wish) = self.ring.next() else { break };
            if let Ok(key) = bytemuck::try_pod_read_unaligned::<FlowKey<V4>>(&wish) {
                let is_caught = key.pad == FlowKey::<V4>::CAUGHT;
                if is_caught { &mut self.caught } else { &mut self.wished }.v4.push(key);
            } else if let Ok(key) = bytemuck::try_pod_read_unaligned::<FlowKey<V6>>(&wish) {
                let is_caught = key.pad == FlowKey::<V6>::CAUGHT;
                if is_caught { &mut self.caught } else { &mut self.wished }.v6.push(key);
            }
        }
    }

    /// What has been wished for since the last call; `None` if nothing has.
    pub fn take(&mut self) -> Option<Granting> {
        self.drain();
        let (before, wished) =
            (std::mem::take(&mut self.granted), std::mem::take(&mut self.wished));
        let is_any = before.count() + wished.count() > 0;
        is_any.then(|| Granting { maps: self.maps.clone(), before, wished })
    }

    /// Keeps in mind who got a short cut: it is looked at once more.
    pub fn keep(&mut self, granted: Keys) {
        self.granted = granted;
    }
}

/// Wishes to be looked at. That needs nothing of the agent, and so can be done on a thread of its own.
pub struct Granting {
    maps: PathBuf,
    /// Who got a short cut before.
    before: Keys,
    wished: Keys,
}

impl Granting {
    /// Gives a short cut to each flow that may have one. Says which got one.
    ///
    /// # Errors
    /// If the maps can't be used, or the kernel's table of connections can't.
    pub fn run(self) -> Result<Granted> {
        let conntrack = Conntrack::open().context("cannot ask for connections by netlink")?;
        let mut error = None;
        let Self { before, wished, .. } = &self;
        let v4 = self.grant(&before.v4, &wished.v4, &conntrack, &mut error)?;
        let v6 = self.grant(&before.v6, &wished.v6, &conntrack, &mut error)?;
        Ok(Granted { keys: Keys { v4, v6 }, error })
    }

    fn grant<F: Family>(
        &self,
        before: &[FlowKey<F>],
        wishes: &[FlowKey<F>],
        conntrack: &Conntrack,
        refused: &mut Option<anyhow::Error>,
    ) -> Result<Vec<FlowKey<F>>> {
        if wishes.is_empty() && before.is_empty() {
            return Ok(Vec::new());
        }
        let mut tables = Tables::<F>::open(&self.maps)?;
        before.iter().for_each(|leaving| tables.mend(leaving));
        let mut granted = Vec::new();
        for wish in wishes {
            let Some(cut) = tables.short_cut(*wish)? else { continue };
            match is_told(wish, conntrack) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    let error = anyhow::Error::from(error);
                    *refused = Some(error.context("the kernel's table of connections"));
                    continue;
                }
            }
            // Once more, as it is now: it may have ended, or changed, meanwhile.
            if let Some(now) = tables.short_cut(*wish)?
                && ends(&now) == ends(&cut)
            {
                tables.write(&now);
                granted.push(*wish);
            }
        }
        Ok(granted)
    }
}

/// The keys of both ends.
fn ends<F: Family>(cut: &ShortCut<F>) -> (FlowKey<F>, FlowKey<F>) {
    (cut.asked.0, cut.answered.0)
}

/// Whether the kernel's table of connections bears to see little of the flow from now on. Of TCP it would take what follows a
/// gap for another connection's, and keep this one for days after its end. It has none by this name that it does not follow,
/// or follows in a zone of its own: there it is not known what it would do.
fn is_told<F: Family>(key: &FlowKey<F>, conntrack: &Conntrack) -> io::Result<bool> {
    if key.proto != proto::TCP || !conntrack::is_in_use() {
        return Ok(true);
    }
    let from = SocketAddr::new(key.src.into(), key.sport.number());
    conntrack.be_liberal(from, SocketAddr::new(key.dst.into(), key.dport.number()))
}

/// What is to be known of a family's flows.
struct Tables<F: Family> {
    flows: HashTable<MapData, FlowKey<F>, FlowValue<F>>,
    backends: Mapped<Backend<F>>,
    ways: Mapped<Way<F>>,
    /// The longest packets that links take.
    mtus: HashMap<u32, u16>,
}

impl<F: Family> Tables<F> {
    fn open(maps: &Path) -> Result<Self> {
        let flows = HashTable::try_from(Map::HashMap(open(maps, &name_of::<F>("flows"))?))?;
        let backends = open_mapped(maps, &name_of::<F>("backends"))?;
        let ways = open_mapped(maps, &name_of::<F>("ways"))?;
        Ok(Self { flows, backends, ways, mtus: HashMap::new() })
    }

    /// The short cut that a flow may have: where the way that is known to its backend is the one that the host stack takes.
    fn short_cut(&mut self, wish: FlowKey<F>) -> Result<Option<ShortCut<F>>> {
        let Some(mut cut) = ShortCut::of(wish, |key| self.flows.get(key, 0).ok()) else {
            return Ok(None);
        };
        let FlowValue { backend, generation, .. } = cut.asked.1;
        if backend >= self.backends.length() {
            return Ok(None);
        }
        let row = self.backends.get(backend).context("cannot read a backend")?;
        if row.generation != generation || row.way >= self.ways.length() {
            return Ok(None);
        }
        let way = self.ways.get(row.way).context("cannot read a way")?;
        let back = cut.answered.1.link;
        cut.answered.1.mtu = *self.mtus.entry(back).or_insert_with(|| mtu_of(back));
        Ok((way.link == cut.link).then_some(cut))
    }

    /// The end of a connection that came while its short cut was written was overwritten then. Where it left the node it is
    /// noted still.
    fn mend(&mut self, leaving: &FlowKey<F>) {
        let record = |tables: &Self, key: &FlowKey<F>| tables.flows.get(key, 0).ok();
        let (there, home) = (record(self, leaving), record(self, &leaving.turned(Side::Egress)));
        let finished = State::Finished as u8;
        for (left, answers) in [(there, home), (home, there)] {
            let is_over = left.is_none_or(|left| left.state == finished);
            let Some(came) = answers.map(|answers| answers.other) else { continue };
            if let Some(value) = record(self, &came)
                && is_over
                && value.facts().is_cut()
                && value.state == State::Established as u8
            {
                let _ = self.flows.insert(came, FlowValue { state: finished, ..value }, EXIST);
            }
        }
    }

    /// Both ends of it. Either works without the other.
    fn write(&mut self, cut: &ShortCut<F>) {
        for (key, value) in [&cut.asked, &cut.answered] {
            // One that is not there any more has ended.
            let _ = self.flows.insert(key, value, EXIST);
        }
    }
}

/// The longest packet that a link takes; 0 if that is not known, or longer than any.
fn mtu_of(ifindex: u32) -> u16 {
    let mtu = || -> io::Result<libc::c_int> {
        let name = nix::net::if_::if_indextoname(ifindex)?;
        let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
        // SAFETY: a struct of plain numbers, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (place, byte) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
            *place = byte.cast_signed();
        }
        // SAFETY: the kernel reads and writes a live struct of the layout that the request has.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &raw mut request) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: that is what the kernel has filled in.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    };
    mtu().ok().and_then(|mtu| u16::try_from(mtu).ok()).unwrap_or_default()
}
