//! Which processes `up` starts and which cores each one gets. Pure: cores come in, a plan goes out.
//!
//! The policy, in one sentence: decode comes first. With [`CoresPolicy::Split`] every node gets an equal share of the
//! cores, and what is left over goes to the decode nodes: decode runs all the time and every user feels its pace, while
//! prefill works in bursts; on a two-core machine both get one. With [`CoresPolicy::Share`], and wherever there are too
//! few cores for everybody, nodes run on the same cores and prefill nodes at [`PREFILL_NICE`]: a burst of prefill uses
//! what decode leaves. The router is not pinned: it needs little, and the scheduler finds it a gap.
//! Read [`Plan`].

use crate::cli::{CoreList, CoresPolicy};
use ridge_protocol::Role;

/// Niceness of prefill's compute threads on cores that decode nodes use too. Beside a busy thread of this niceness, 8 ms
/// of work after a short sleep took 8 ms in nine cases of ten; beside one of niceness 10, 12 ms; of niceness 0, 16 ms. The
/// scheduler's idle class was no better.
const PREFILL_NICE: u8 = 19;

/// One process to start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    /// What it does.
    pub role: Role,
    /// Its name, such as `decode-0`.
    pub name: String,
    /// Compute threads; 0 for the router.
    pub threads: usize,
    /// Cores for its threads, or `None` if there are not enough for everybody.
    pub cores: Option<CoreList>,
    /// Niceness of its compute threads.
    pub nice: u8,
    /// Other nodes compute on the same cores.
    pub shared: bool,
}

/// All processes, the router first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What to start, in this order.
    pub members: Vec<Member>,
    /// Something the user should know about the sharing.
    pub remark: Option<String>,
}

impl Plan {
    /// Shares `cores`, neighbours first, among `prefill` and `decode` nodes. `threads` overrides each node's share.
    pub fn new(prefill: usize, decode: usize, threads: Option<usize>, policy: CoresPolicy, cores: &[usize]) -> Self {
        assert!(decode > 0, "at least one decode node");
        let nodes = prefill + decode;
        let split = policy == CoresPolicy::Split || nodes == 1;
        let shares: Vec<usize> = match threads {
            Some(threads) => vec![threads; nodes],
            None if split => {
                // In the order of serving: decode nodes first.
                (0..nodes).map(|i| (cores.len() / nodes + usize::from(i < cores.len() % nodes)).max(1)).collect()
            }
            None => vec![cores.len(); nodes],
        };
        let wanted: usize = if split { shares.iter().sum() } else { shares.iter().copied().max().unwrap_or(0) };
        let pinned = wanted <= cores.len();
        let shared = !(split && pinned);
        let remark = (!pinned).then(|| {
            format!(
                "{nodes} nodes want {wanted} threads but there are {} cores: threads are not pinned and will share",
                cores.len()
            )
        });
        let mut rest = cores;
        let mut serve = |role: Role, index: usize, threads: usize| {
            let mine = if split { rest.split_off(..threads.min(rest.len())).unwrap_or(&[]) } else { cores };
            let mut mine = mine.to_vec();
            mine.sort_unstable();
            Member {
                role,
                name: format!("{role}-{index}"),
                threads,
                cores: pinned.then_some(CoreList(mine)),
                nice: if shared && role == Role::Prefill { PREFILL_NICE } else { 0 },
                shared: shared && nodes > 1,
            }
        };
        let decoders: Vec<Member> = (0..decode).map(|i| serve(Role::Decode, i, shares[i])).collect();
        let prefillers: Vec<Member> = (0..prefill).map(|i| serve(Role::Prefill, i, shares[decode + i])).collect();
        let router =
            Member { role: Role::Router, name: "router".into(), threads: 0, cores: None, nice: 0, shared: false };
        let members = std::iter::once(router).chain(prefillers).chain(decoders).collect();
        Self { members, remark }
    }
}

/// The cores this process may use, hyper-threads of one core next to each other, so that a share cut from the list
/// has as few halves of a core as possible.
pub fn available_cores() -> Vec<usize> {
    let quota = std::thread::available_parallelism().map_or(1, usize::from);
    let mut cores = match rustix::thread::sched_getaffinity(None) {
        Ok(set) => (0..rustix::thread::CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        Err(error) => {
            tracing::warn!(%error, "cannot read the set of usable cores");
            (0..quota).collect::<Vec<_>>()
        }
    };
    cores.sort_by_key(|cpu| (topology(*cpu, "physical_package_id"), topology(*cpu, "core_id"), *cpu));
    // A container may see more cores than its quota lets it use.
    cores.truncate(quota);
    cores
}

fn topology(cpu: usize, file: &str) -> i64 {
    let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/{file}");
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(cpu as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(prefill: usize, decode: usize, threads: Option<usize>, cores: usize, want: &[(&str, usize, &str)]) {
        let cores: Vec<usize> = (0..cores).collect();
        let plan = Plan::new(prefill, decode, threads, CoresPolicy::Split, &cores);
        let seen: Vec<(String, usize, String)> = plan.members[1..]
            .iter()
            .map(|m| (m.name.clone(), m.threads, m.cores.as_ref().map_or("any".into(), CoreList::to_string)))
            .collect();
        let want: Vec<_> = want.iter().map(|(n, t, c)| ((*n).to_owned(), *t, (*c).to_owned())).collect();
        assert_eq!(seen, want);
        assert_eq!(plan.members[0].role, Role::Router);
        assert_eq!(plan.remark.is_some(), want.iter().any(|w| w.2 == "any"));
    }

    #[test]
    fn cores_are_disjoint_and_decode_comes_first() {
        check(1, 1, None, 2, &[("prefill-0", 1, "1"), ("decode-0", 1, "0")]);
        check(1, 1, None, 5, &[("prefill-0", 2, "3-4"), ("decode-0", 3, "0-2")]);
        check(1, 2, None, 8, &[("prefill-0", 2, "6-7"), ("decode-0", 3, "0-2"), ("decode-1", 3, "3-5")]);
        check(0, 1, None, 2, &[("decode-0", 2, "0-1")]);
        check(1, 1, Some(2), 8, &[("prefill-0", 2, "2-3"), ("decode-0", 2, "0-1")]);
    }

    #[test]
    fn too_few_cores_are_shared() {
        check(1, 1, None, 1, &[("prefill-0", 1, "any"), ("decode-0", 1, "any")]);
        check(1, 1, Some(4), 2, &[("prefill-0", 4, "any"), ("decode-0", 4, "any")]);
    }

    #[test]
    fn shared_cores_are_everybodys_and_prefill_gives_way() {
        let placed = |plan: Plan| -> Vec<(usize, Option<String>, u8, bool)> {
            let nodes = plan.members.into_iter().skip(1);
            nodes.map(|m| (m.threads, m.cores.map(|c| c.to_string()), m.nice, m.shared)).collect()
        };
        let cores = [0, 1, 2, 3];
        let share = |prefill, decode, threads| placed(Plan::new(prefill, decode, threads, CoresPolicy::Share, &cores));
        let all = Some("0-3".to_owned());
        assert_eq!(share(1, 1, None), [(4, all.clone(), PREFILL_NICE, true), (4, all.clone(), 0, true)]);
        assert_eq!(share(0, 1, None), [(4, all, 0, false)]);
        assert_eq!(share(1, 1, Some(8)), [(8, None, PREFILL_NICE, true), (8, None, 0, true)]);
        // One core for two nodes: whoever asked for a split gets the same courtesy.
        let one = placed(Plan::new(1, 1, None, CoresPolicy::Split, &[0]));
        assert_eq!(one, [(1, None, PREFILL_NICE, true), (1, None, 0, true)]);
        let split = placed(Plan::new(1, 1, None, CoresPolicy::Split, &cores));
        assert_eq!(split, [(2, Some("2-3".into()), 0, false), (2, Some("0-1".into()), 0, false)]);
    }

    #[test]
    fn this_machine_has_cores() {
        assert!(!available_cores().is_empty());
    }
}
