//! The ways from this node to backends, asked of the kernel's routing table: the address that a packet
//! of the node's own would have, and the link that it would leave by. Masqueraded flows use both.
//!
//! A task of its own asks, so that nothing waits for long for an answer that is late. What is not answered is asked
//! again; it does not count as "no route".

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt, stream};
use ipnet::IpNet;
use rtnetlink::packet_route::link::LinkAttribute;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric};
use rtnetlink::{Handle, RouteMessageBuilder, new_connection};
use tokio::sync::mpsc;

/// How many questions are under way at a time.
const AT_ONCE: usize = 64;
/// How many answers are told together.
const TOLD_AT_ONCE: usize = 512;
/// For how long it is remembered how long a link's packets may be.
const FRESH: Duration = Duration::from_millis(100);
/// How long an answer may take before the question is put again.
const LATE: Duration = Duration::from_secs(1);
/// How long it is until questions without an answer are put again.
const AGAIN: Duration = Duration::from_millis(200);
/// How long who has new backends to write waits for their ways: without them flows from outside are dropped.
const PATIENCE: Duration = Duration::from_millis(50);

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
    pub fn has(&self, address: IpAddr) -> bool {
        self.numbers.contains_key(&address)
    }

    /// Forgets all other addresses.
    pub fn keep_only(&mut self, wanted: &HashSet<IpAddr>) {
        self.numbers.retain(|address, _| wanted.contains(address));
    }
}

/// Who knows the routes.
pub trait Ask: Send + Sync + 'static {
    /// The way to an address; the inner `None` if there is none. `None` if there is no answer.
    fn ask(&self, address: IpAddr) -> impl Future<Output = Option<Option<Route>>> + Send;
}

/// Has the routing table asked for the addresses of backends, each once and when its way may have changed.
pub struct Resolver {
    asked: HashSet<IpAddr>,
    questions: mpsc::UnboundedSender<Vec<IpAddr>>,
    answers: mpsc::UnboundedReceiver<Routes>,
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
        Ok(Self::by(Kernel { handle, mtus: Mutex::default() }))
    }

    /// A resolver that asks someone. Must be called within a runtime.
    pub fn by(who: impl Ask) -> Self {
        let (questions, asked) = mpsc::unbounded_channel();
        let (answer, answers) = mpsc::unbounded_channel();
        tokio::spawn(answer_all(who, asked, answer));
        Self { asked: HashSet::new(), questions, answers }
    }

    /// Asks for addresses that were not asked for before, and waits a little. Returns what is new; the rest comes from
    /// [`Self::changed`].
    pub async fn learn(&mut self, addresses: impl Iterator<Item = IpAddr>) -> Routes {
        let mut missing: HashSet<IpAddr> = addresses.filter(|a| self.asked.insert(*a)).collect();
        self.ask(missing.iter().copied().collect());
        let mut learnt = Routes::new();
        let all = async {
            while !missing.is_empty() {
                let answers = self.changed().await;
                answers.keys().for_each(|address| _ = missing.remove(address));
                learnt.extend(answers);
            }
        };
        if tokio::time::timeout(PATIENCE, all).await.is_err() {
            tracing::debug!("the ways to {} backends are not known yet", missing.len());
        }
        learnt
    }

    /// Asks anew for the addresses in these ranges.
    pub fn refresh(&mut self, ranges: &[IpNet]) {
        let is_one = |range: &&IpNet| range.prefix_len() == range.max_prefix_len();
        let (hosts, nets): (Vec<&IpNet>, Vec<&IpNet>) = ranges.iter().partition(is_one);
        let mut concerned: HashSet<IpAddr> = hosts.iter().map(|host| host.addr()).collect();
        concerned.retain(|address| self.asked.contains(address));
        if !nets.is_empty() {
            let is_in = |address: &&IpAddr| nets.iter().any(|range| range.contains(*address));
            concerned.extend(self.asked.iter().filter(is_in));
        }
        self.ask(concerned.into_iter().collect());
    }

    /// Forgets all other addresses.
    pub fn keep_only(&mut self, wanted: &HashSet<IpAddr>) {
        self.asked.retain(|address| wanted.contains(address));
    }

    /// What has been answered since.
    pub async fn changed(&mut self) -> Routes {
        let Some(mut answers) = self.answers.recv().await else {
            // Its task has ended with the runtime.
            return std::future::pending().await;
        };
        answers.retain(|address, _| self.asked.contains(address));
        answers
    }

    fn ask(&self, addresses: Vec<IpAddr>) {
        if !addresses.is_empty() {
            // The task lives as long as this.
            let _ = self.questions.send(addresses);
        }
    }
}

/// Asks for what comes, for ever; again for what is not answered.
async fn answer_all(
    who: impl Ask,
    mut questions: mpsc::UnboundedReceiver<Vec<IpAddr>>,
    answers: mpsc::UnboundedSender<Routes>,
) {
    let mut open: HashSet<IpAddr> = HashSet::new();
    loop {
        let more = if open.is_empty() {
            questions.recv().await
        } else {
            // What is asked meanwhile does not wait for the rest.
            tokio::time::timeout(AGAIN, questions.recv()).await.unwrap_or_else(|_| Some(Vec::new()))
        };
        let Some(more) = more else { return };
        let batch = if more.is_empty() { open.iter().copied().collect() } else { more };
        for part in batch.chunks(TOLD_AT_ONCE) {
            let (answered, silent) = ask_all(&who, part).await;
            answered.keys().for_each(|address| _ = open.remove(address));
            if !silent.is_empty() && open.is_empty() {
                tracing::warn!(
                    "the kernel does not say which ways lead to backends; it is asked again"
                );
            }
            open.extend(silent);
            if !answered.is_empty() && answers.send(answered).is_err() {
                return;
            }
        }
    }
}

/// What is answered, and who is not.
async fn ask_all(who: &impl Ask, addresses: &[IpAddr]) -> (Routes, Vec<IpAddr>) {
    let questions = addresses.iter().copied().map(async |address| {
        let answer = tokio::time::timeout(LATE, who.ask(address)).await;
        (address, answer.ok().flatten())
    });
    let all: Vec<_> = stream::iter(questions).buffer_unordered(AT_ONCE).collect().await;
    let (mut answered, mut silent) = (Routes::new(), Vec::new());
    for (address, answer) in all {
        match answer {
            Some(route) => _ = answered.insert(address, route),
            None => silent.push(address),
        }
    }
    (answered, silent)
}

/// The kernel, by netlink.
struct Kernel {
    handle: Handle,
    /// How long links' packets may be, and when that was asked: few links lead to many addresses.
    mtus: Mutex<HashMap<u32, (u16, Instant)>>,
}

impl Ask for Kernel {
    async fn ask(&self, address: IpAddr) -> Option<Option<Route>> {
        let message = match address {
            IpAddr::V4(to) => {
                RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 32).build()
            }
            IpAddr::V6(to) => {
                RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, 128).build()
            }
        };
        match self.handle.route().get(message).execute().try_next().await {
            Ok(answer) => {
                let Some(mut route) = route(&answer?) else { return Some(None) };
                let of_link = self.mtu(route.link).await?;
                route.mtu = if route.mtu == 0 { of_link } else { route.mtu.min(of_link) };
                Some(Some(route))
            }
            Err(rtnetlink::Error::NetlinkError(error)) if says_no_way(error.raw_code()) => {
                Some(None)
            }
            Err(error) => {
                tracing::debug!("the way to {address}: {error}");
                None
            }
        }
    }
}

impl Kernel {
    /// The longest packet that a link takes; 0 if it has just gone.
    async fn mtu(&self, link: u32) -> Option<u16> {
        let known = self.mtus.lock().expect("no panic while locked").get(&link).copied();
        if let Some((mtu, _)) = known.filter(|(_, when)| when.elapsed() < FRESH) {
            return Some(mtu);
        }
        let mtu = self.ask_mtu(link).await?;
        self.mtus.lock().expect("no panic while locked").insert(link, (mtu, Instant::now()));
        Some(mtu)
    }

    async fn ask_mtu(&self, link: u32) -> Option<u16> {
        let mut answer = self.handle.link().get().match_index(link).execute();
        let message = match answer.try_next().await {
            Ok(message) => message,
            Err(rtnetlink::Error::NetlinkError(error)) if error.raw_code() == -libc::ENODEV => None,
            Err(_) => return None,
        };
        let mtu =
            message.into_iter().flat_map(|message| message.attributes).find_map(|attribute| {
                match attribute {
                    LinkAttribute::Mtu(mtu) => Some(mtu),
                    _ => None,
                }
            });
        Some(u16::try_from(mtu.unwrap_or_default()).unwrap_or(u16::MAX))
    }
}

/// Whether an error of the kernel's is an answer: no route, or one that is unreachable, prohibited or a blackhole. Others
/// say nothing of routes.
fn says_no_way(code: i32) -> bool {
    matches!(
        -code,
        libc::ENETUNREACH
            | libc::EHOSTUNREACH
            | libc::EACCES
            | libc::EINVAL
            | libc::ESRCH
            | libc::ENODEV
    )
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// What a stand-in says when it is asked for an address.
    #[derive(Clone, Copy)]
    enum Manner {
        Answers(Option<Route>),
        Fails,
        IsSilent,
    }

    /// A stand-in for the kernel.
    #[derive(Clone, Default)]
    struct StandIn {
        manners: Arc<Mutex<HashMap<IpAddr, Manner>>>,
    }

    impl StandIn {
        fn set(&self, address: IpAddr, manner: Manner) {
            self.manners.lock().unwrap().insert(address, manner);
        }
    }

    impl Ask for StandIn {
        async fn ask(&self, address: IpAddr) -> Option<Option<Route>> {
            let manner = self.manners.lock().unwrap().get(&address).copied();
            match manner.expect("nobody asks for others") {
                Manner::Answers(route) => Some(route),
                Manner::Fails => None,
                Manner::IsSilent => std::future::pending().await,
            }
        }
    }

    fn at(host: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, host])
    }

    fn by(link: u32) -> Route {
        Route { source: at(200), link, mtu: 1500, hop: None }
    }

    fn run(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.unwrap().block_on(test);
    }

    #[test]
    fn what_is_late_keeps_nobody_waiting_and_comes_later() {
        run(async {
            let kernel = StandIn::default();
            kernel.set(at(1), Manner::Answers(Some(by(1))));
            kernel.set(at(2), Manner::Fails);
            let mut resolver = Resolver::by(kernel.clone());
            let learnt = resolver.learn([at(1), at(2)].into_iter()).await;
            assert_eq!(learnt, [(at(1), Some(by(1)))].into());
            // An error is no answer: not even that there is no way.
            kernel.set(at(2), Manner::Answers(Some(by(2))));
            assert_eq!(resolver.changed().await, [(at(2), Some(by(2)))].into());
            // Neither is asked for again.
            assert_eq!(resolver.learn([at(1), at(2)].into_iter()).await, Routes::new());
        });
    }

    #[test]
    fn who_never_answers_holds_up_no_other() {
        run(async {
            let kernel = StandIn::default();
            kernel.set(at(1), Manner::IsSilent);
            kernel.set(at(2), Manner::Answers(None));
            let mut resolver = Resolver::by(kernel.clone());
            assert_eq!(resolver.learn([at(1)].into_iter()).await, Routes::new());
            let mut heard = resolver.learn([at(2)].into_iter()).await;
            while heard.is_empty() {
                heard = resolver.changed().await;
            }
            assert_eq!(heard, [(at(2), None)].into());
            kernel.set(at(1), Manner::Answers(Some(by(1))));
            assert_eq!(resolver.changed().await, [(at(1), Some(by(1)))].into());
        });
    }

    #[test]
    fn only_what_a_change_concerns_is_asked_anew() {
        run(async {
            let kernel = StandIn::default();
            for host in 1..=3 {
                kernel.set(at(host), Manner::Answers(Some(by(1))));
            }
            let mut resolver = Resolver::by(kernel.clone());
            resolver.learn((1..=3).map(at)).await;
            for host in 1..=3 {
                kernel.set(at(host), Manner::Answers(Some(by(2))));
            }
            let host = |number| IpNet::new(at(number), 32).unwrap();
            // One that nobody wants to know, and one that somebody does.
            resolver.refresh(&[host(9), host(2)]);
            assert_eq!(resolver.changed().await, [(at(2), Some(by(2)))].into());
            resolver.keep_only(&[at(1)].into());
            resolver.refresh(&["10.0.0.0/24".parse().unwrap()]);
            assert_eq!(resolver.changed().await, [(at(1), Some(by(2)))].into());
        });
    }

    #[test]
    fn errors_that_say_nothing_of_routes_are_no_answers() {
        assert!(says_no_way(-libc::ENETUNREACH) && says_no_way(-libc::EACCES));
        assert!(
            !says_no_way(-libc::ENOMEM)
                && !says_no_way(-libc::ENOBUFS)
                && !says_no_way(-libc::EINTR)
        );
    }
}
