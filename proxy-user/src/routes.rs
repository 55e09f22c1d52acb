//! The ways from this node to backends, asked of the kernel's routing table: the address that a packet
//! of the node's own would have, and the link that it would leave by. Masqueraded flows use both.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use ipnet::IpNet;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric};
use rtnetlink::{Handle, RouteMessageBuilder, new_connection};

/// How many questions are under way at a time.
const AT_ONCE: usize = 64;

/// A way to an address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Route {
    /// The node's address on this way.
    pub source: IpAddr,
    /// The link that it begins with.
    pub link: u32,
    /// The longest IP packet that it takes; 0 if it is not known.
    pub mtu: u16,
    /// The gateway that packets are handed to, if there is one, of the same family.
    pub hop: Option<IpAddr>,
}

/// Ways that have changed, by destination; `None` where there is none any more.
pub type Routes = HashMap<IpAddr, Option<Route>>;

/// Ways by destination. Many addresses have few ways, so each is kept once.
#[derive(Default)]
pub struct Known {
    /// Which of `routes` leads to an address; [`NO_ROUTE`] if none does.
    numbers: HashMap<IpAddr, u32>,
    routes: Vec<Route>,
    by_route: HashMap<Route, u32>,
}

/// The number of a route that there is not.
const NO_ROUTE: u32 = u32::MAX;

impl Known {
    /// Takes in what is known of an address by now.
    pub fn insert(&mut self, address: IpAddr, route: Option<Route>) {
        let number = route.map_or(NO_ROUTE, |route| self.number(route));
        self.numbers.insert(address, number);
    }

    fn number(&mut self, route: Route) -> u32 {
        *self.by_route.entry(route).or_insert_with(|| {
            self.routes.push(route);
            u32::try_from(self.routes.len() - 1).expect("there are fewer links")
        })
    }

    /// The way to an address, if one is known.
    pub fn get(&self, address: IpAddr) -> Option<Route> {
        self.routes.get(*self.numbers.get(&address)? as usize).copied()
    }

    /// Whether an address was asked for.
    fn has(&self, address: IpAddr) -> bool {
        self.numbers.contains_key(&address)
    }

    /// Forgets all other addresses.
    pub fn keep_only(&mut self, wanted: &HashSet<IpAddr>) {
        self.numbers.retain(|address, _| wanted.contains(address));
    }
}

/// Asks the routing table, and remembers what it said.
pub struct Resolver {
    handle: Handle,
    known: Known,
}

impl Resolver {
    /// A resolver in the calling thread's network namespace. Must be called within a runtime.
    ///
    /// # Errors
    /// If netlink can't be used.
    pub fn new() -> Result<Self> {
        let (connection, handle, _) =
            new_connection().context("cannot ask for routes by netlink")?;
        tokio::spawn(connection);
        Ok(Self { handle, known: Known::default() })
    }

    /// Asks for addresses that were not asked for before. Returns what is new.
    pub async fn learn(&mut self, addresses: impl Iterator<Item = IpAddr>) -> Routes {
        let fresh: HashSet<IpAddr> = addresses.filter(|a| !self.known.has(*a)).collect();
        let answers = self.ask_all(fresh).await;
        answers.iter().for_each(|(address, route)| self.known.insert(*address, *route));
        answers
    }

    /// Asks anew for the addresses in these ranges that are still `wanted`. Returns what has changed.
    pub async fn refresh(&mut self, wanted: &HashSet<IpAddr>, ranges: &[IpNet]) -> Routes {
        self.known.keep_only(wanted);
        let is_concerned = |address: &&IpAddr| ranges.iter().any(|range| range.contains(*address));
        let concerned = self.known.numbers.keys().filter(is_concerned);
        let concerned: Vec<IpAddr> = concerned.copied().collect();
        let mut changed = self.ask_all(concerned).await;
        changed.retain(|address, route| self.known.get(*address) != *route);
        changed.iter().for_each(|(address, route)| self.known.insert(*address, *route));
        changed
    }

    async fn ask_all(&self, addresses: impl IntoIterator<Item = IpAddr>) -> Routes {
        let questions = addresses.into_iter().map(async |a| (a, self.ask(a).await));
        let mut routes: Routes = stream::iter(questions).buffer_unordered(AT_ONCE).collect().await;
        let links: HashSet<u32> = routes.values().flatten().map(|route| route.link).collect();
        let mut mtus: HashMap<u32, u16> = HashMap::new();
        for link in links {
            mtus.insert(link, self.mtu(link).await);
        }
        for route in routes.values_mut().flatten() {
            let of_link = mtus[&route.link];
            route.mtu = if route.mtu == 0 { of_link } else { route.mtu.min(of_link) };
        }
        routes
    }

    /// The longest packet that a link takes; 0 if it has just gone.
    async fn mtu(&self, link: u32) -> u16 {
        let mut answer = self.handle.link().get().match_index(link).execute();
        let message = answer.try_next().await.ok().flatten();
        let mtu =
            message.into_iter().flat_map(|message| message.attributes).find_map(|attribute| {
                match attribute {
                    LinkAttribute::Mtu(mtu) => Some(mtu),
                    _ => None,
                }
            });
        u16::try_from(mtu.unwrap_or_default()).unwrap_or(u16::MAX)
    }

    async fn ask(&self, address: IpAddr) -> Option<Route> {
        let message = match address {
            IpAddr::V4(to) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 32).build()
            }
            IpAddr::V6(to) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, 128).build()
            }
        };
        let answer = self.handle.route().get(message).execute().try_next().await;
        // An error means that there is no way.
        answer.ok().flatten().as_ref().and_then(route)
    }
}

/// The longest packet as a route says it; 0 if it does not.
fn route_mtu(metrics: &[RouteMetric]) -> u16 {
    let mtu = metrics.iter().find_map(|metric| match metric {
        RouteMetric::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    u16::try_from(mtu.unwrap_or_default()).unwrap_or(u16::MAX)
}

fn route(answer: &RouteMessage) -> Option<Route> {
    let (mut source, mut link, mut mtu, mut hop) = (None, None, 0, None);
    let mut is_passing = false;
    for attribute in &answer.attributes {
        match attribute {
            RouteAttribute::PrefSource(RouteAddress::Inet(address)) => {
                source = Some((*address).into());
            }
            RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => {
                source = Some((*address).into());
            }
            RouteAttribute::Gateway(RouteAddress::Inet(address)) => hop = Some((*address).into()),
            RouteAttribute::Gateway(RouteAddress::Inet6(address)) => hop = Some((*address).into()),
            RouteAttribute::Oif(index) => link = Some(*index),
            RouteAttribute::Metrics(metrics) => mtu = route_mtu(metrics),
            RouteAttribute::CacheInfo(info) => is_passing = info.expires != 0,
            _ => {}
        }
    }
    // What the kernel has learnt of the path holds for a while only; whoever asks too much is told anew.
    let mtu = if is_passing { 0 } else { mtu };
    Some(Route { source: source?, link: link?, mtu, hop })
}
